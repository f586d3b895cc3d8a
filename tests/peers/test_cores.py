"""Peers in edgec's own formats: true bytes, sizes within their budget, and each method better than its plainer kin."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgec import peers
from edgec.errors import UsageError
from edgec.export.targets import get_target
from edgec.fit import fit, stored_bytes
from edgec.moments import SecondMoment
from edgec.peers import Peer, svd, tt
from edgec.peers._cores import fitting, largest_rank
from edgec.quantize import descent, gptq
from edgec.quantize.formats import CoreFormat, QuantizedTensor
from edgec.records import Spec

TARGET = get_target("onnx-x64")
OUT, IN = 96, 128


@cache
def _layer(seed: int = 0) -> tuple[np.ndarray, SecondMoment]:
    """A weight with a falling spectrum, and activations that prefer some directions."""
    random = np.random.default_rng(seed)
    u, s, vh = np.linalg.svd(random.standard_normal((OUT, IN)), full_matrices=False)
    weight = (u * (s / np.arange(1, len(s) + 1) ** 0.7)) @ vh
    x = random.standard_normal((512, IN)) @ np.diag(np.geomspace(4, 0.05, IN)) @ random.standard_normal((IN, IN))
    return weight.astype(np.float32), SecondMoment(x.T @ x / len(x))


def _error(peer: Peer, seed: int = 0) -> float:
    weight, moment = _layer(seed)
    return moment.squared(weight - peer.replace(weight, moment).factors.dense()) / moment.squared(weight)


def _named(family: str, name: str, bits: tuple[float, ...] = (3.0,)) -> Peer:
    return next(p for p in peers.get(family).peers(TARGET, bits) if p.name == name)


def test_every_file_is_a_method() -> None:
    assert set(peers.families()) == {"ggml", "gptq", "rtn", "svd", "svd_llm", "tt"}
    assert peers.chosen("all") == peers.families()
    assert peers.chosen("none") == ()
    assert peers.chosen("tt, rtn,tt") == ("tt", "rtn")


@pytest.mark.parametrize("text", ["rtn,awq", "", "all,rtn", "../rtn"])
def test_unknown_methods_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--peers .*expected all, none, or some of ggml, gptq"):
        peers.chosen(text)


@pytest.mark.parametrize("family", ["rtn", "gptq", "svd", "svd_llm", "tt"])
def test_bytes_are_those_of_the_cores_and_values_are_near(family: str) -> None:
    weight, moment = _layer()
    made = [(peer, peer.replace(weight, moment)) for peer in peers.get(family).peers(TARGET, (8.0, 5.0))]
    assert len({peer.name for peer, _ in made}) == len(made)
    for peer, replacement in made:
        assert replacement.bytes == replacement.factors.stored_bytes
        assert replacement.factors.dense().shape == weight.shape
        assert _error(peer) < 1
    assert _error(made[0][0]) < 0.05  # the largest of each method is close


@pytest.mark.parametrize("family", ["rtn", "gptq"])
def test_formats_are_those_of_the_target_with_and_without_zero_points(family: str) -> None:
    names = {p.name.split()[1] for p in peers.get(family).peers(TARGET, ()) if p.runtime == TARGET.name}
    low = {f for f in TARGET.dense_formats if not f.startswith("int8")}
    assert names == set(TARGET.dense_formats) | {f"{f}-zp" for f in low}


def test_what_nothing_executes_says_so() -> None:
    weight, moment = _layer()
    simulated = [p for p in peers.get("gptq").peers(TARGET, ()) if p.runtime == "none"]
    for peer in simulated:
        assert "int3" in peer.name
        assert peer.replace(weight, moment).simulated
    executed = _named("gptq", "GPTQ int4-b32").replace(weight, moment)
    assert not executed.simulated
    assert executed.healable


def test_gptq_is_the_papers_and_not_what_edgec_makes_of_it() -> None:
    weight, moment = _layer()
    fmt = CoreFormat.parse("int4-b32")
    stored = _named("gptq", "GPTQ int4-b32").replace(weight, moment).factors.cores["weight"]
    own = fit(weight, Spec("dense"), fmt, moment=moment).cores["weight"]
    assert isinstance(stored, QuantizedTensor)
    assert isinstance(own, QuantizedTensor)
    np.testing.assert_array_equal(stored.codes, gptq.quantize(weight, fmt, moment).codes)
    np.testing.assert_array_equal(own.codes, descent.quantize(weight, fmt, moment).codes)
    assert (stored.codes != own.codes).any()


def test_looking_at_activations_pays() -> None:
    """GPTQ against rounding, whitened against plain SVD: less error on the activations, at the same bytes."""
    weight, moment = _layer()
    for fmt in ("int4-b32", "int2-b64"):
        assert _error(_named("gptq", f"GPTQ {fmt}")) < _error(_named("rtn", f"RTN {fmt}"))
    plain, white = _named("svd", "SVD + int8 at 3"), _named("svd_llm", "SVD-LLM + int8 at 3")
    assert plain.replace(weight, moment).bytes == white.replace(weight, moment).bytes
    assert _error(white) < 0.8 * _error(plain)


@pytest.mark.parametrize("structure", [svd.low_rank, tt.interleaved])
@given(bits=st.floats(0.5, 16.0), out=st.sampled_from([96, 256, 384]), in_=st.sampled_from([100, 256, 768]))
def test_sized_peers_take_the_largest_rank_that_fits(
    structure: Callable[[int, int], tuple[Callable[[int], Spec], int]], bits: float, out: int, in_: int
) -> None:
    spec_of, top = structure(out, in_)
    fmt = CoreFormat.parse("int8-b32")
    rank = largest_rank(spec_of, top, (out, in_), fmt, bits)

    def size(rank: int) -> int:
        return stored_bytes(spec_of(rank), (out, in_), "linear", fmt)

    assert 1 <= rank <= top
    assert rank == 1 or size(rank) <= bits * out * in_ / 8
    assert rank == top or size(rank + 1) > bits * out * in_ / 8


def test_a_sized_peer_is_what_its_rank_says() -> None:
    """In blocks of 32 where bonds are long, of 16 where those waste their padding."""
    weight, moment = _layer()
    for bits, family in ((3.0, "tt"), (3.0, "svd"), (7.0, "svd")):
        (made,) = [p.replace(weight, moment) for p in peers.get(family).peers(TARGET, (bits,))]
        spec_of, top = (tt.interleaved if family == "tt" else svd.low_rank)(OUT, IN)
        formats = [CoreFormat.parse(name) for name in ("int8-b32", "int8-b16")]
        ranks = [largest_rank(spec_of, top, (OUT, IN), fmt, bits) for fmt in formats]
        fmt = formats[ranks.index(max(ranks))]
        assert made.form == f"χ={max(ranks)} {fmt}"
        assert made.bytes == stored_bytes(spec_of(max(ranks)), (OUT, IN), "linear", fmt) <= bits * OUT * IN / 8


def test_a_narrow_layer_takes_the_widest_block_that_fits() -> None:
    assert fitting(CoreFormat.parse("int4-b128"), 768) == CoreFormat.parse("int4-b128")
    assert fitting(CoreFormat.parse("int4-b128"), 100) == CoreFormat.parse("int4-b64")
    assert fitting(CoreFormat.parse("int2-b64-zp"), 8) == CoreFormat.parse("int2-b16-zp")
