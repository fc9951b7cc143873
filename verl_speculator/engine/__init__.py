"""The glue to verl. Outside of this folder only `train.py`, `train_ppo.py`, `rollout/push.py` and
`rollout/verl_worker.py` import it."""
