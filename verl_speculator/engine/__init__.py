"""The glue to verl: everything that imports it lies in this folder and in `verl_speculator.train`."""
