"""The glue to verl: everything that imports it lies in this folder and in `verl_speculator.train`."""

from verl_speculator.import_warnings import silence_import_warnings

silence_import_warnings()  # before any module here imports verl
