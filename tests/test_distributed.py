"""PyTorch's own distributed engines over adapted layers: two processes against one, with gloo on a CPU."""

import socket

import pytest
import torch
import workers

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)
HALF_BASE = (torch.bfloat16, torch.float32)


@pytest.fixture(scope="module")
def pair():
    processes = workers.Pair()
    yield processes
    processes.stop()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class TestDDP:
    @pytest.mark.parametrize(
        ("recompute", "options"),
        [
            (False, {}),
            (True, {}),
            (False, {"find_unused_parameters": True}),
            (True, {"static_graph": True, "gradient_as_bucket_view": True}),
        ],
    )
    def test_is_one_process(self, pair, recompute, options):
        pair.run(workers.ddp, recompute, options)

    def test_accumulates_without_communication(self, pair):
        pair.run(workers.ddp_accumulates)

    def test_dropout_masks_differ_and_parameters_do_not(self, pair):
        pair.run(workers.ddp_dropout)


class TestFSDP2:
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}], ids=str)
    def test_is_one_process(self, pair, recompute, options):
        pair.run(workers.fsdp, torch.float32, None, recompute, options)

    def test_float32_adapters_on_a_bfloat16_base(self, pair):
        pair.run(workers.fsdp, *HALF_BASE, False, {})

    def test_refuses_to_merge(self, pair):
        pair.run(workers.fsdp_refuses_to_merge)

    @pytest.mark.parametrize("apart", [False, True])
    @pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}], ids=str)
    def test_disabled_with_modules_to_save(self, pair, apart, options):
        pair.run(workers.fsdp_disabled, apart, options)

    def test_disabled_with_merged_layers(self, pair):
        pair.run(workers.fsdp_disabled_and_merged)

    def test_disabled_between_forward_and_backward(self, pair):
        pair.run(workers.fsdp_gradients_beside_disabled)

    def test_one_group_for_the_whole_model(self, pair):
        pair.run(workers.fsdp_root_only)

    def test_mixed_precision_policy(self, pair):
        pair.run(workers.fsdp_mixed_precision)

    def test_meta_device_set_up(self, pair):
        pair.run(workers.fsdp_from_meta)

    def test_state_dicts(self, pair, tmp_path):
        pair.run(workers.fsdp_state_dict, str(tmp_path))


class TestTensorParallel:
    @pytest.mark.parametrize(
        ("dtypes", "dropout", "rank", "recompute"),
        [
            ((torch.float32, None), 0.0, 4, False),
            ((torch.float32, None), 0.0, 4, True),
            ((torch.float32, None), 0.0, 3, False),  # a rank that does not divide by the processes
            ((torch.float32, None), 0.5, 4, False),
            ((torch.float32, None), 0.5, 4, True),
            (HALF_BASE, 0.0, 4, False),
        ],
    )
    def test_is_one_process(self, pair, dtypes, dropout, rank, recompute):
        pair.run(workers.tensor_parallel, *dtypes, dropout, rank, recompute)

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_sequence_parallel(self, pair, dropout):
        pair.run(workers.sequence_parallel, dropout)

    @pytest.mark.parametrize("sequence", [False, True])
    @pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
    def test_inference(self, pair, mode, sequence):
        pair.run(workers.tensor_parallel_inference, mode, sequence)

    def test_full_state_dict(self, pair):
        pair.run(workers.tensor_parallel_state_dict)

    def test_beside_fsdp2(self, pair):
        pair.run(workers.tensor_parallel_with_fsdp)


@pytest.mark.parametrize("engine", ["fsdp", "tensor_parallel"])
def test_adapter_files_of_sharded_models(pair, engine, tmp_path):
    pytest.importorskip("safetensors")
    pair.run(workers.sharded_adapter_files, engine, str(tmp_path / "adapter"))


class TestLibraries:
    def test_accelerate(self, pair):
        pytest.importorskip("accelerate")
        first, second = pair.run(workers.accelerated, free_port())
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_trainer(self, pair, tmp_path):
        """Two processes with batches of four take the steps of one with batches of eight."""
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        pair.stop()  # accelerate keeps its state for the life of a process
        (losses, ours), (_, others) = pair.run(workers.trained, free_port(), str(tmp_path / "two"), 4)
        alone = workers.trained(0, None, str(tmp_path / "one"), 8)
        assert losses == pytest.approx(alone[0], rel=1e-3)
        assert losses[-1] < losses[0]
        assert ours.keys() == alone[1].keys()
        for name, value in alone[1].items():
            assert torch.equal(ours[name], others[name]), name
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
