"""The trainer's side of a hot swap: an actor's speculator to the rollout, and the rollout's account back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor


async def push_speculator(rollout: Any, tensors: Iterable[tuple[str, Tensor]], version: int | None = None) -> None:
    """Send a speculator to the vLLM workers of a verl rollout. Called by every rank, behind `rollout.update_weights`.

    It goes the way of the base's weights: each rank sends to the worker on its own device, through verl's buckets.
    A parameter in another type than the served one is converted there.

    Args:
        rollout: verl's `ServerAdapter`.
        tensors: every parameter of the speculator, whole, under the module's names; all ranks in the same order.
        version: the trainer's step, usually.
    """
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    call = await rollout._execute_method(
        "update_speculator_from_ipc", non_block=True, kwargs={"version": version, "use_shm": rollout.use_shm}
    )
    sender = BucketedWeightSender(
        zmq_handle=rollout.zmq_handle,
        bucket_size_mb=rollout.config.checkpoint_engine.update_weights_bucket_megabytes,
        use_shm=rollout.use_shm,
    )
    await sender.async_send_weights(iter(tensors))
    if call is not None:
        await call


async def collect_accounts(rollout: Any) -> list[dict[str, Any]]:
    """What this rank's rollout drafted since the last call: `account.rollout_metrics` makes metrics of it.

    Through files, since verl's `collective_rpc` gives no results back. Empty on ranks that hold no server; workers on
    other machines than the server's are not asked, and count the same requests.

    Args:
        rollout: verl's `ServerAdapter`.
    """
    with tempfile.TemporaryDirectory(prefix="verl_speculator.") as directory:
        await rollout._execute_method("write_speculator_account", args=(directory,))
        return [json.loads(path.read_text()) for path in sorted(Path(directory).glob("[0-9]*.json"))]
