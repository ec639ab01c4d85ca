"""Noise belongs to a sample: a hash of (seed, index, position), uniform, independent, the same in any batch."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.losses import reference

import holdfast
from holdfast.noise import AuditStream, Noise, SmoothingStream, Stream

N = 20_000
DEVICES = ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])]
DRAWS = {
    "bits": lambda noise, shape: noise.bits(shape),
    "uniform": lambda noise, shape: noise.uniform(shape),
    "uniform64": lambda noise, shape: noise.uniform(shape, torch.float64),
    "normal": lambda noise, shape: noise.normal(shape),
    "gaussian": lambda noise, shape: noise.gaussian(shape),
    "a later draw": lambda noise, shape: noise.gaussian(shape, noise.index % 5),
    "sign": lambda noise, shape: noise.sign(shape),
    "integers": lambda noise, shape: noise.integers(1000, shape),
}
seeds = st.integers(-(2**70), 2**70)
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def noise_of(n=N, seed=0):
    return Noise(seed, torch.arange(n))


@given(seeds, st.lists(st.integers(0, 2**40), min_size=1, max_size=4), st.integers(1, 6))
def test_bits_are_the_published_hash(seed, index, count):
    drawn = Noise(seed, torch.tensor(index)).bits((count,)).tolist()
    assert [[value % 2**64 for value in row] for row in drawn] == [reference.bits(seed, i, count) for i in index]


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@given(seeds, shapes, st.data())
def test_a_samples_numbers_do_not_depend_on_its_batch(draw, seed, shape, data):
    n = data.draw(st.integers(2, 12))
    noise = Noise(seed, torch.randperm(1000, generator=torch.Generator().manual_seed(n))[:n])
    whole = draw(noise, shape)
    assert whole.shape == (n, *shape)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    assert torch.equal(draw(noise[order], shape), whole[order])
    start = data.draw(st.integers(0, n - 1))
    assert torch.equal(draw(noise[start : start + 2], shape), whole[start : start + 2])
    keep = torch.arange(n) % 2 == 0
    assert torch.equal(draw(noise[keep], shape), whole[keep])
    assert len(noise[keep]) == int(keep.sum())


def test_a_longer_draw_starts_with_the_shorter_one_and_an_empty_batch_is_empty():
    noise = noise_of(5)
    assert torch.equal(noise.uniform((7,))[:, :3], noise.uniform((3,)))
    assert torch.equal(noise.uniform((2, 3)).flatten(1), noise.uniform((6,)))
    assert noise.uniform(()).shape == (5,)
    assert noise[:0].uniform((3, 2)).shape == (0, 3, 2)


@given(seeds, st.lists(st.integers(-5, 2**33), min_size=1, max_size=3))
def test_fold_is_a_chain_of_keys_and_depends_on_each_and_their_order(seed, keys):
    noise = Noise(seed, torch.arange(3))
    chained = noise
    for key in keys:
        chained = chained.fold(key)
    assert noise.fold(*keys).seed == chained.seed
    assert torch.equal(noise.fold(*keys).index, noise.index)
    assert noise.fold(*keys).seed != noise.seed % 2**64
    for place in range(len(keys)):
        other = [key + (i == place) for i, key in enumerate(keys)]
        assert noise.fold(*other).seed != chained.seed
    if keys != keys[::-1]:
        assert noise.fold(*keys[::-1]).seed != chained.seed
    assert noise.seed == seed


def test_folding_commutes_with_slicing_and_leaves_the_parent_alone():
    noise, rows = noise_of(10), torch.tensor([7, 2])
    before = noise.uniform((3,))
    assert torch.equal(noise.fold(3)[rows].uniform((3,)), noise[rows].fold(3).uniform((3,)))
    assert torch.equal(noise.uniform((3,)), before)
    assert torch.equal(noise.index, torch.arange(10))


def test_many_folds_never_meet():
    noise = noise_of(1)
    streams = {noise.fold(a, b).seed for a in range(100) for b in range(100)} | {noise.fold(a).seed for a in range(100)}
    assert len(streams) == 100 * 100 + 100


def test_no_two_of_a_hundred_thousand_samples_share_a_number():
    noise = noise_of(100_000)
    drawn = torch.cat([noise.bits((2,)).flatten(), noise.fold(0).bits(()), Noise(1, noise.index).bits(())])
    assert len(drawn.unique()) == len(drawn)
    assert len(noise.uniform((4,)).unique(dim=0)) == len(noise)


STREAMS = {
    "positions": lambda: noise_of().uniform((8,), torch.float64).T,
    "folds": lambda: torch.stack([noise_of().fold(k).uniform((), torch.float64) for k in range(8)]),
    "seeds": lambda: torch.stack([noise_of(seed=k).uniform((), torch.float64) for k in range(8)]),
    "neighbours": lambda: torch.stack([Noise(0, torch.arange(k, N + k)).uniform((), torch.float64) for k in range(8)]),
    "a fold and its parent": lambda: torch.stack([noise_of().uniform(), noise_of().fold(0).uniform()]),
    "seed and index swapped": lambda: torch.stack(
        [noise_of(seed=5).uniform((), torch.float64), Noise(6, torch.arange(N) - 1).uniform((), torch.float64)]
    ),
}


@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
def test_streams_are_uncorrelated(streams):
    u = streams().double()
    for form in (u, (u - 0.5).square(), (u * 64) % 1):  # the value, its spread, its lower digits
        correlation = np.corrcoef(form.numpy())
        assert np.abs(correlation - np.eye(len(u))).max() < 4.5 / math.sqrt(N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1, -7, 2**64 - 1])
def test_uniform_is_uniform(dtype, seed):
    drawn = noise_of(seed=seed).uniform((2,), dtype)
    for column in drawn.T:
        assert scipy.stats.kstest(column.double().numpy(), "uniform").pvalue > 1e-3
    # pairs of a sample fill the square
    cells = (drawn[:, 0] * 16).long() * 16 + (drawn[:, 1] * 16).long()
    assert scipy.stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > 1e-3


def test_every_bit_is_fair():
    drawn = noise_of().bits(())
    for place in range(64):
        ones = int(((drawn >> place) & 1).sum())
        assert abs(ones - N / 2) < 4.5 * math.sqrt(N) / 2, place


def test_normal_and_sign_have_their_laws():
    noise = noise_of()
    assert scipy.stats.kstest(noise.normal((), torch.float64).numpy(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(noise.normal().double().numpy(), "norm").pvalue > 1e-3
    sign = noise.sign((3,))
    assert set(sign.unique().tolist()) == {-1.0, 1.0}
    assert sign.mean(0).abs().max() < 4.5 / math.sqrt(N)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_keeps_to_the_open_interval_in_every_dtype(dtype):
    drawn = noise_of(50_000).uniform((40,), dtype)
    assert drawn.dtype is dtype
    assert drawn.min() > 0
    assert drawn.max() < 1


def test_the_extreme_bits_stay_inside_the_open_interval(monkeypatch):
    for value in (0, -1):  # all zeros, all ones
        monkeypatch.setattr(Noise, "bits", lambda self, shape, value=value: torch.full((1, *shape), value))
        for dtype in (torch.float32, torch.float64):
            drawn = noise_of(1).uniform((1,), dtype)
            assert 0 < drawn.item() < 1
            assert noise_of(1).normal((1,), dtype).isfinite().all()
        assert noise_of(1).integers(2**31, (1,)).item() == (2**31 - 1 if value else 0)


def test_dtypes_are_what_was_asked_for():
    noise = noise_of(3)
    assert noise.bits((2,)).dtype is torch.int64
    assert noise.integers(5, (2,)).dtype is torch.int64
    for dtype in (torch.float32, torch.float64):
        assert noise.uniform((2,), dtype).dtype is dtype
        assert noise.normal((2,), dtype).dtype is dtype
        assert noise.sign((2,), dtype).dtype is dtype
    small = Noise(0, torch.arange(3, dtype=torch.int32))
    assert torch.equal(small.bits((2,)), noise.bits((2,)))


@pytest.mark.parametrize("high", [1, 2, 3, 10, 997, 2**31])
def test_integers_fill_their_range_evenly(high):
    drawn = noise_of().integers(high, (2,))
    assert drawn.min() >= 0
    assert drawn.max() < high
    if 1 < high <= 1000:
        assert scipy.stats.chisquare(torch.bincount(drawn.flatten(), minlength=high).numpy()).pvalue > 1e-3
    if high == 2**31:
        assert scipy.stats.kstest(drawn.flatten().double().numpy() / high, "uniform").pvalue > 1e-3


def test_streams_of_one_parent_are_distinct():
    """Enums make equal values aliases of one member: __members__ shows those too."""
    for parent in Stream.__subclasses__():
        keys = [one.value + number for one in parent.__members__.values() for number in range(one.count)]
        assert len(keys) == len(set(keys)), parent
    with pytest.raises(ValueError, match="1000 streams"):
        SmoothingStream.ATTACKED.numbered(1000)


def test_streams_keep_their_values():
    """Records were drawn with them."""
    values = {p.__name__: [(s.value, s.count) if s.count > 1 else s.value for s in p] for p in Stream.__subclasses__()}
    assert values == {
        "EvaluationStream": [10_000, 20_000, 30_000, 31_000, 32_000, 33_000],
        "AuditStream": [
            *range(1, 10), *range(11, 16), 20, 30, 31, 32, 40, 90, 91, 92,
        ],
        "StageStream": [0],
        "BracketStream": [0, 1],
        "StartStream": [1, 2],
        "GridStream": [3],
        "SmoothingStream": [0, 1, 2, 3, 4, (100, 1000)],
        "CorruptionStream": [*range(15)],
        "CorruptionPart": [0, 1, 2, 3, 4],
        "PatchStream": [0, 1],
        "TrainingStream": [10_000],
        "SquareStream": [0],
        "SquareQueryStream": [1, 2, 3, 4],
    }  # fmt: skip
    noise = noise_of(5)
    assert torch.equal(noise.fold(AuditStream.RAYS, 2).bits(()), noise.fold(30, 2).bits(()))


def test_no_stream_is_a_bare_number():
    """Whoever folds noise, or runs an attack of the audit, names the stream."""
    for path in Path(holdfast.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("fold", "attack", "attack_in_float64"):
                numbers = [part for part in call.args if isinstance(part, ast.Constant) and type(part.value) is int]
                sums = [part for part in call.args if isinstance(part, ast.BinOp)]
                assert not [*numbers, *sums], f"{path}, line {call.lineno}: give the stream a name in holdfast.noise"


@pytest.mark.parametrize("device", DEVICES)
def test_everything_stays_on_the_index_device(device):
    noise = Noise(3, torch.arange(4, device=device)).fold(1)
    for draw in DRAWS.values():
        drawn = draw(noise, (2, 3))
        assert drawn.device.type == device
        if device == "cuda":
            assert torch.equal(drawn.cpu(), draw(Noise(noise.seed, torch.arange(4)), (2, 3)))
