"""`dtype=auto` on a CPU, and hub names without a hub."""

from __future__ import annotations

import logging

import pytest
import torch

from verl_speculator.base_model.loading import check_hub, choose_dtype
from verl_speculator.utils.process import cpu_computes_bf16
from verl_speculator.utils.settings import UserError


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_where_the_cpu_computes_it(monkeypatch, caplog, has_bf16, dtype):
    monkeypatch.setattr("verl_speculator.base_model.loading.cpu_computes_bf16", lambda: has_bf16)
    with caplog.at_level(logging.INFO, "verl_speculator.base_model.loading"):
        assert choose_dtype("auto", "cpu") == dtype
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("dtype bf16: this CPU" if has_bf16 else "dtype fp32: this CPU has no")
        assert choose_dtype("fp32", "cpu") == torch.float32 and choose_dtype("auto", "cuda") == torch.bfloat16
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)]
)
def test_a_cpu_computes_bf16_with_either_instruction_set(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_computes_bf16() is expected


def test_a_torch_that_names_no_capabilities_computes_none(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cpu_computes_bf16() is False


def test_a_hub_name_without_a_hub_is_refused_at_once(monkeypatch, tmp_path):
    """Nothing is asked of the network where the name cannot be resolved, or where the user forbids it."""
    from huggingface_hub import constants

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    check_hub("base=x", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^base=no/model: no such directory, .* while HF_HUB_OFFLINE forbids"):
        check_hub("base=no/model", "no/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"127\.0\.0\.1 cannot be reached \(Connection refused\); expected a directory"):
        check_hub("base=no/model", "no/model")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    check_hub("base=no/model", "no/model")
