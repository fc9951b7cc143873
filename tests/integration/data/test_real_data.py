"""The main job on real data, where shared/ exists next to the project."""

from __future__ import annotations

from helpers.training_runs import read_log, script


def test_gsm8k(shared, tmp_path):
    log = tmp_path / "log.jsonl"
    settings = {
        "model.partial_pretrain": shared / "models" / "gsm8k-tiny",
        "data.train_files": shared / "data" / "gsm8k" / "train.parquet",
        "data.val_files": shared / "data" / "gsm8k" / "test.parquet",
        "data.val_max_samples": 32,
        "data.train_batch_size": 16,
        "optim.lr": "1e-2",
        "model.speculator.method": "sum_lstm",
        "model.speculator.n_predict": 3,
        **{f"model.speculator.{name}_dim": 64 for name in ("inner", "emb", "proj")},
        "trainer.total_training_steps": 12,
        "trainer.device": "cpu",
        "trainer.logger": "file",
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    result = script(1, tmp_path / "run", *given, VERL_FILE_LOGGER_PATH=str(log))
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = read_log(log)
    assert metrics[12]["train/loss"] < 0.85 * metrics[1]["train/loss"]
    assert metrics[12]["val/depth0_accuracy"] > 0.02
