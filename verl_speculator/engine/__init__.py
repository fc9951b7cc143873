"""The glue to verl. Outside of this folder only `train.py`, `train_ppo.py`, `rollout/push.py` and
`rollout/verl_worker.py` import it."""

from verl_speculator.import_warnings import silence_import_warnings

silence_import_warnings()  # before any module here imports verl
