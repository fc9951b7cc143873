"""Embeddings and heads of a tensor-parallel worker."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref

import pytest
import torch

from helpers.vllm_runner import install
from helpers.vllm_workers import Workers
from verl_speculator import SpeculatorConfig, build_speculator
from verl_speculator.models.layers import tables_of

FAMILIES = {
    "sum_rnn": {"tie_weights": False, "inner_dim": "8.6", "emb_dim": 6, "proj_dim": 6},
    "sum_lstm": {"method": "sum_lstm", "tie_lstm_embs": True, "inner_dim": 8, "emb_dim": 8, "proj_dim": 8},
    "the_bases_tables": {"embedding": "base", "head": "base", "inner_dim": 8, "emb_dim": 8, "proj_dim": 8},
    "medusa": {"method": "medusa"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_tables_are_freed(name, monkeypatch):
    workers = Workers(2)
    install(monkeypatch, workers=workers)
    shard_tables = importlib.import_module("verl_speculator.vllm_plugin.sharding").shard_tables
    speculator = build_speculator(
        SpeculatorConfig(n_predict=3, **FAMILIES[name]), hidden_size=16, vocab_size=61, seed=0
    )
    whole = [weakref.ref(each) for table in tables_of(speculator).values() for each in (table, table.weight)]

    def work(rank):
        return shard_tables(speculator) if rank == 0 else {}

    shards, _ = workers.run(work)
    gc.collect()
    assert shards and all(reference() is None for reference in whole)
    rows = [shard.weight.shape[0] for shard in shards.values()]
    assert rows == [31] * len(shards)
    assert all(torch.equal(speculator.get_parameter(key), shard.weight) for key, shard in shards.items())
    sys.modules.pop("verl_speculator.vllm_plugin.sharding", None)
