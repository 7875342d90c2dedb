"""Two processes with gloo for the distributed tests, and what they run.

The processes live as long as the pair, as importing PyTorch costs more than any of the checks. Each function
with a first argument ``rank`` runs in both at once, in a process group of its own, and compares with the same
computation in one process, which every rank makes for itself.
"""

import os
import tempfile
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora

WORLD = 2


def _serve(rank, connection):
    torch.set_num_threads(1)
    while True:
        function, arguments, folder = connection.recv()
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
            )
            torch.manual_seed(0)
            result = function(rank, *arguments)
            dist.barrier()
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class Pair:
    """Two worker processes; :meth:`run` calls a function of this module in both."""

    def __init__(self):
        self.processes, self.connections = [], []

    def _start(self):
        context = multiprocessing.get_context("spawn")
        for rank in range(WORLD):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.connections.append(mine)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections = [], []

    def run(self, function, *arguments, timeout=120):
        """``function(rank, *arguments)`` of each rank; AssertionError with the traceback of one that failed.

        A rank that fails leaves the other waiting for it, so both are started again then.
        """
        if not self.processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for connection in self.connections:
                connection.send((function, arguments, folder))
            end, results = time.monotonic() + timeout, {}
            while len(results) < WORLD:
                for rank, connection in enumerate(self.connections):
                    if rank not in results and connection.poll(0.02):
                        succeeded, results[rank] = connection.recv()
                        if not succeeded:
                            self.stop()
                            raise AssertionError(f"rank {rank}:\n{results[rank]}")
                if time.monotonic() > end:
                    self.stop()
                    raise AssertionError(f"{function.__name__}{arguments}: no answer after {timeout} s")
        return [results[rank] for rank in range(WORLD)]


def model(dtype=torch.float32, adapter_dtype=None, dropout=0.0, rank=3):
    """An adapted three-layer net, the same on every rank, whose adapters are not at their start."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)).to(dtype)
    fastlora.apply_lora(net, ["0", "2"], rank=rank, alpha=2.0, dropout=dropout, adapter_dtype=adapter_dtype)
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.A, std=0.3)
    return net


def trainable(net):
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def adam(net):
    return torch.optim.AdamW(trainable(net).values(), lr=0.05)


def whole(tensor):
    """A tensor with all its shards; Tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(ours, theirs, what, rtol=1e-4, atol=1e-6):
    """Compare two nets' trainable parameters and, where present, gradients; names are those of ``theirs``."""
    ours = {name.removeprefix("module."): value for name, value in trainable(ours).items()}
    theirs = trainable(theirs)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        actual = ours[name]
        assert (actual.grad is None) == (expected.grad is None), f"{what}: gradient of {name}"
        for kind, a, b in (("value", actual, expected), ("gradient", actual.grad, expected.grad)):
            if b is not None:
                torch.testing.assert_close(
                    whole(a).detach(),
                    b.detach(),
                    rtol=rtol,
                    atol=atol,
                    msg=lambda text, k=kind, n=name: f"{what}: {k} of {n}: {text}",
                )


def train_beside(rank, ours, single, steps=3, loss=lambda y: y.float().square().mean(), **tolerance):
    """Train ``ours`` on this rank's half of each batch, ``single`` on all of it: the same at every step."""
    optimizers = adam(ours), adam(single)
    dtype = next(single.parameters()).dtype
    for step in range(steps):
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss(ours(x.chunk(WORLD)[rank])).backward()
        loss(single(x)).backward()
        assert_same(ours, single, f"step {step}", **tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, single, "after training", **tolerance)


def checkpointed(net):
    """The first adapted layer recomputed in backward, without re-entering autograd."""
    forward = net[0].forward
    net[0].forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    return net


def ddp(rank, recompute, options):
    net = model()
    net = nn.parallel.DistributedDataParallel(checkpointed(net) if recompute else net, **options)
    train_beside(rank, net, model())


def ddp_accumulates(rank):
    """Two half steps, the first without communication, are one step on all four quarters."""
    net, single = nn.parallel.DistributedDataParallel(model()), model()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    first, second = x.chunk(WORLD)[rank].chunk(2)
    with net.no_sync():
        net(first).square().mean().backward()
    net(second).square().mean().backward()
    (2 * single(x).square().mean()).backward()
    assert_same(net, single, "accumulated")


def ddp_dropout(rank):
    """Ranks draw masks of their own, and parameters stay the same on all of them."""
    net = nn.parallel.DistributedDataParallel(model(dropout=0.5))
    torch.manual_seed(100 + rank)
    y = net(torch.ones(6, 8))
    outputs = [torch.empty_like(y) for _ in range(WORLD)]
    dist.all_gather(outputs, y.detach())
    assert not torch.equal(*outputs)
    optimizer = adam(net)
    y.square().mean().backward()
    optimizer.step()
    for name, parameter in trainable(net).items():
        everyones = [torch.empty_like(parameter) for _ in range(WORLD)]
        dist.all_gather(everyones, parameter.detach())
        assert torch.equal(*everyones), name


def _sharded(net, mesh=None, **options):
    """What the README shows: each adapted layer a group, the rest another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (WORLD,))
    for layer in net.modules():
        if isinstance(layer, fastlora.FusedLoRALinear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def fsdp(rank, dtype, adapter_dtype, recompute, options):
    net = model(dtype, adapter_dtype)
    net = _sharded(checkpointed(net) if recompute else net, **options)
    for name, parameter in net.named_parameters():
        assert parameter.to_local().numel() < parameter.numel(), f"{name} is not sharded"
    half = dtype != torch.float32
    train_beside(rank, net, model(dtype, adapter_dtype), **({"rtol": 0.05, "atol": 5e-3} if half else {}))


def fsdp_refuses_to_merge(rank):
    net = _sharded(model())
    before = [type(module) for module in net.modules()]
    with pytest.raises(ValueError, match="the model is sharded by fully_shard"):
        fastlora.merge_lora(net)
    assert [type(module) for module in net.modules()] == before


def _with_head(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(12))
    return net.eval()


def fsdp_disabled(rank, apart, options):
    """With modules to save, before a step and after it: the frozen model inside, the trained one after it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    base, net = _with_head(0), _with_head(0)
    fastlora.apply_lora(net, ["0"], modules_to_save=["2", "3"])
    if apart:
        fully_shard(net[2], mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    trained = dict(net.named_parameters())
    optimizer = torch.optim.SGD([p for p in trained.values() if p.requires_grad], 0.5)
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)).chunk(WORLD)[rank]
    for _ in range(3):
        with torch.no_grad():
            expected = net(x)
            with fastlora.disable_adapter(net), fastlora.disable_adapter(net):
                torch.testing.assert_close(net(x), base(x))
            torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
        y = net(x)  # its graph lives on while the values are exchanged
        with torch.no_grad(), fastlora.disable_adapter(net):
            reference = net(x)
        (y - reference + 1).square().sum().backward()
        assert all(p.grad is not None for p in trained.values() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p is trained[name] for name, p in net.named_parameters())
    assert not torch.allclose(net(x), base(x), atol=0.1)


def fsdp_disabled_and_merged(rank):
    """The unmerged weights go into the shards too; gradients inside are refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    base, net = _with_head(0), _with_head(0)
    fastlora.apply_lora(net, ["0", "2"], rank=3)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.A.fill_(0.3)
            layer.merge()
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        with torch.no_grad(), fastlora.disable_adapter(net):
            torch.testing.assert_close(net(x), base(x))
        with (
            fastlora.disable_adapter(net),
            pytest.raises(RuntimeError, match="Linear is sharded by fully_shard"),
        ):
            net(x)
        y = net(x.clone().requires_grad_())
        assert not torch.allclose(y, base(x), atol=0.1)
        y.sum().backward()


def fsdp_gradients_beside_disabled(rank):
    """A reference pass between forward and backward changes no gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)).chunk(WORLD)[rank]
    found = []
    for disabled in (False, True):
        net = _with_head(0)
        fastlora.apply_lora(net, ["0"], modules_to_save=["2", "3"])
        with torch.no_grad():
            net[2].weight.mul_(1.5)
            net[0].A.fill_(0.1)
        fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
        y = net(x)
        if disabled:
            with torch.no_grad(), fastlora.disable_adapter(net):
                net(x)
        y.square().sum().backward()
        found.append([whole(p.grad) for p in net.parameters() if p.requires_grad])
    torch.testing.assert_close(*found)


def fsdp_root_only(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(model(), mesh=init_device_mesh("cpu", (WORLD,)))
    train_beside(rank, net, model())


def fsdp_mixed_precision(rank):
    """bf16 compute over fp32 shards: gradients in the shards' dtype, near the fp32 ones."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net, single = _sharded(model(), mp_policy=policy), model()
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    y = net(x.chunk(WORLD)[rank])
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    single(x).square().mean().backward()
    assert_same(net, single, "mixed", rtol=0.1, atol=0.02)


def fsdp_from_meta(rank):
    """Built without memory, sharded, given memory, initialised: a fresh adapter on a fresh base."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))
        fastlora.apply_lora(net, ["0", "2"], rank=3, alpha=2.0)
    net = _sharded(net)
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.constant_(parameter, float("nan"))
    for layer in net.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    assert set(trainable(net)) == {"0.A", "0.B", "2.A", "2.B"}
    for name, parameter in net.named_parameters():
        values = whole(parameter.detach())
        if name.endswith("A"):
            assert not values.any(), name
        else:
            bound = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 8**-0.5
            assert values.isfinite().all(), name
            assert 0.3 * bound < values.abs().max() <= bound, name
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    net(x.chunk(WORLD)[rank]).square().mean().backward()
    for name, parameter in trainable(net).items():
        # B's gradient goes through A, which is zero.
        assert whole(parameter.grad).any() == name.endswith("A"), name


def fsdp_state_dict(rank, folder):
    """A full state dict loads into one process; a sharded checkpoint is read back by sharded layers."""
    import torch.distributed.checkpoint as checkpoints
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    net = _sharded(model())
    train_beside(rank, net, model(), steps=1)
    full = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    adapters = get_model_state_dict(
        net, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    )
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    y = net(x).detach()
    if rank == 0:
        single = model()
        assert set(full) == set(single.state_dict())
        assert set(adapters) == set(trainable(single))
        single.load_state_dict(full)
        torch.testing.assert_close(single(x).detach(), y)
        fastlora.load_adapter_state_dict(single, adapters)
    checkpoints.save(get_model_state_dict(net), checkpoint_id=folder)
    fresh = model()
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh = _sharded(fresh)
    state = get_model_state_dict(fresh)
    checkpoints.load(state, checkpoint_id=folder)
    set_model_state_dict(fresh, state)
    torch.testing.assert_close(fresh(x).detach(), y)


def _parallel(net, sequence=False, mesh=None):
    """The usual column and row pair; with ``sequence`` the activations outside are sharded by token."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    first, second = ColwiseParallel(), RowwiseParallel()
    if sequence:
        first, second = ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))
    mesh = mesh or init_device_mesh("cpu", (WORLD,))
    return parallelize_module(net, mesh, {"0": first, "2": second})


def tensor_parallel(rank, dtype, adapter_dtype, dropout, lora_rank, recompute):
    """Values, gradients, AdamW steps and gradient clipping are those of one process."""
    options = {"dtype": dtype, "adapter_dtype": adapter_dtype, "dropout": dropout, "rank": lora_rank}
    net, single = model(**options), model(**options)
    net = _parallel(checkpointed(net) if recompute else net)
    assert net[0].weight.to_local().shape == (8, 8)
    assert net[0].A.to_local().shape[0] == 8
    assert net[2].weight.to_local().shape == (12, 8)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-2}
    optimizers = adam(net), adam(single)
    for step in range(3):
        x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        results = []
        for each in (net, single):
            leaf = x.clone().requires_grad_()
            # The ranks' generators differ but for the first, whose mask counts.
            torch.manual_seed(step + 1000 * rank * (each is net))
            y = each(leaf)
            y.float().square().mean().backward()
            results.append((whole(y).detach(), leaf.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)
        assert_same(net, single, f"step {step}", **tolerance)
        norms = [nn.utils.clip_grad_norm_(trainable(each).values(), 0.1) for each in (net, single)]
        torch.testing.assert_close(*map(whole, norms), **tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if dtype == torch.float32:
        assert_same(net, single, "after training", **tolerance)


def tensor_parallel_inference(rank, mode, sequence):
    net, single = _parallel(model(), sequence=sequence), model()
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    with getattr(torch, mode)():
        y, z = net(x.chunk(WORLD, 1)[rank] if sequence else x), single(x)
    y = whole(y)
    torch.testing.assert_close(y, z.chunk(WORLD, 1)[rank] if sequence else z, rtol=1e-4, atol=1e-5)


def sequence_parallel(rank, dropout):
    net, single = _parallel(model(dropout=dropout), sequence=True), model(dropout=dropout)
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    mine = x.chunk(WORLD, 1)[rank].clone().requires_grad_()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1000 * rank)
    y = net(mine)
    y.square().sum().backward()
    torch.manual_seed(0)
    z = single(leaf)
    z.square().sum().backward()
    torch.testing.assert_close(whole(y).detach(), z.detach().chunk(WORLD, 1)[rank], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.grad, leaf.grad.chunk(WORLD, 1)[rank], rtol=1e-4, atol=1e-5)
    assert_same(net, single, "sequence parallel", atol=1e-5)


def tensor_parallel_state_dict(rank):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(_parallel(model()), options=options)
    if rank == 0:
        single = model().state_dict()
        assert full.keys() == single.keys()
        for name, value in single.items():
            assert torch.equal(full[name], value), name


def tensor_parallel_with_fsdp(rank):
    """FSDP2 over a mesh's first axis, tensor parallel over its second."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("data", "tensor"))
    net = _sharded(_parallel(model(), mesh=mesh["tensor"]), mesh=mesh["data"])
    train_beside(rank, net, model())


def sharded_adapter_files(rank, engine, folder):
    """All ranks save one whole adapter, which one process and the sharded model itself read back."""
    net = {"fsdp": _sharded, "tensor_parallel": _parallel}[engine](model())
    expected = {name: whole(parameter.detach()).clone() for name, parameter in trainable(net).items()}
    fastlora.save_adapter(net, folder)
    dist.barrier()
    single = model()
    for parameter in [*trainable(single).values(), *trainable(net).values()]:
        nn.init.zeros_(parameter)
    own = trainable(net)

    def check(net):
        for name, parameter in trainable(net).items():
            assert torch.equal(whole(parameter.detach()), expected[name]), name

    check(fastlora.load_adapter(single, folder))
    check(fastlora.load_adapter(net, folder))
    for state in (fastlora.adapter_state_dict(single), fastlora.adapter_state_dict(net)):
        state = {name: value.clone() for name, value in state.items()}
        for parameter in own.values():
            nn.init.zeros_(parameter)
        check(fastlora.load_adapter_state_dict(net, state))
    assert all(parameter is own[name] for name, parameter in trainable(net).items())


def _announce(rank, port):
    """The environment that torchrun would set."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )


def accelerated(rank, port):
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    _announce(rank, port)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(3))
    net, single = model(), model()
    net, optimizer, loader = accelerator.prepare(net, adam(net), DataLoader(TensorDataset(x), batch_size=4))
    theirs = adam(single)
    for step, (mine,) in enumerate(loader):
        accelerator.backward(net(mine).square().mean())
        single(x[8 * step : 8 * step + 8]).square().mean().backward()
        assert_same(net, single, f"step {step}")
        for each in (optimizer, theirs):
            each.step()
            each.zero_grad()
    assert step == 2
    unwrapped = accelerator.unwrap_model(net)
    assert_same(unwrapped, single, "unwrapped")
    return {name: value.detach() for name, value in fastlora.adapter_state_dict(unwrapped).items()}


class _Data(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(0, 32, (6,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


def trained(rank, port, folder, batch):
    """Losses and adapters of the Trainer on a tiny Llama; in one process if ``port`` is None."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    if port is not None:
        _announce(rank, port)
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    net = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))
    fastlora.apply_lora(net, "all-linear", rank=2, alpha=2.0)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_steps=3,
        learning_rate=0.02,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=True,
        ddp_find_unused_parameters=False,
        seed=4,
    )
    trainer = Trainer(model=net, args=arguments, train_dataset=_Data())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: value.detach().clone() for name, value in fastlora.adapter_state_dict(net).items()}
