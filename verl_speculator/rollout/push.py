"""The trainer's side of the draft-weight sync: an actor's speculator to the rollout, and the rollout's account back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole_tensors(
    parameters: Mapping[str, Tensor], *, device: Any = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Gather parameters one after the other; a tensor is kept no longer than whoever asked for it keeps it.

    Args:
        parameters: this rank's shards (`DTensor`), or whole tensors; all ranks in the same order.
        device: of what is given out; by default where each lies.
        dtype: of what is given out, taken before the gathering, so that ranks send each other no more; by default
            each one's own.
    """
    for name, parameter in parameters.items():
        yield name, _whole(parameter.detach().to(device=device, dtype=dtype))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


async def push_speculator(rollout: Any, parameters: Mapping[str, Tensor], version: int | None = None) -> None:
    """Send a speculator to the vLLM workers of a verl rollout.

    Called by every rank, where verl calls `rollout.update_weights`: with the device's expandable segments switched off,
    since what lies in them cannot be shared with another process twice.

    It goes the way of the base's weights: each rank sends to the worker on its own device, through verl's buckets. At
    no time are more than two tensors whole on a rank, in the type that the rollout serves (`rollout.dtype`).

    Args:
        rollout: verl's `ServerAdapter`.
        parameters: every parameter of the speculator, as this rank holds it, under the module's names; all ranks in
            the same order.
        version: the trainer's step, usually. None for a sync at no step: the version stays what it was.
    """
    from verl.utils.device import get_device_id
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    call = await rollout._execute_method(
        "update_speculator_from_ipc",
        non_block=True,
        kwargs={
            "shapes": {name: list(parameter.shape) for name, parameter in parameters.items()},
            "version": version,
            "use_shm": rollout.use_shm,
        },
    )
    sender = BucketedWeightSender(
        zmq_handle=rollout.zmq_handle,
        bucket_size_mb=rollout.config.checkpoint_engine.update_weights_bucket_megabytes,
        use_shm=rollout.use_shm,
    )
    # vLLM's names of types are torch's; auto, the base's own, is left to the worker to convert to.
    served_dtype = getattr(torch, rollout.config.dtype, None)
    await sender.async_send_weights(whole_tensors(parameters, device=get_device_id(), dtype=served_dtype))
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
