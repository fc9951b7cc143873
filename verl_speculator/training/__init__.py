"""verl's SFT training with a speculator: engine, trainers, checkpoints.

Outside of this folder and rl/ only `train.py`, `train_ppo.py`, `data/dataset.py` and `vllm_plugin/worker.py` import
verl.
"""

from verl_speculator.utils.process import silence_import_warnings

silence_import_warnings()  # before any module here imports verl

MODEL_TYPE = "language_model_with_speculator"  # under which verl knows the engine
