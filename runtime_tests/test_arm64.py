"""onnxruntime's aarch64 wheel runs every operator that the exporters write, and agrees with x86-64."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgec.bench.devices._arm64_root import python_command
from edgec.errors import BenchError
from runtime_tests.arm64.artifacts import check_decoder, check_encoder
from runtime_tests.arm64.build import PackagesOutOfReachError, ensure_root
from runtime_tests.arm64.compare import Gap, compare_with_x86, judge, max_gap
from runtime_tests.arm64.op_graphs import OpGraph, op_graphs
from runtime_tests.arm64.root import CPUS, Arm64Error, Arm64Root, Arm64Run, Case, UnsupportedOnArm64Error
from runtime_tests.arm64.variants import PORTABLE_KERNELS
from runtime_tests.arm64.worker import run_case

GRAPHS = {graph.name: graph for graph in op_graphs()}
RUNNING = [name for name, graph in GRAPHS.items() if not graph.refused]
REFUSED = [name for name, graph in GRAPHS.items() if graph.refused]

Results = Mapping[tuple[str, str], Arm64Run | Arm64Error]


@pytest.fixture(scope="module")
def op_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every graph as a file."""
    folder = tmp_path_factory.mktemp("op-models")
    paths = {name: folder / f"{name}.onnx" for name in GRAPHS}
    for name, path in paths.items():
        onnx.save(GRAPHS[name].model, path)
    return paths


@pytest.fixture(scope="module")
def op_results(arm64_root: Arm64Root, op_models: dict[str, Path]) -> Results:
    """Every graph run on arm64, by CPU model and name; one emulated process per CPU model."""
    cases = [Case(op_models[name], graph.inputs) for name, graph in GRAPHS.items()]
    return {
        (cpu, name): result
        for cpu in CPUS
        for name, result in zip(GRAPHS, arm64_root.run_many(cases, cpu=cpu), strict=True)
    }


def _graph_inputs(name: str) -> dict[str, np.ndarray]:
    graph: OpGraph = GRAPHS[name]
    return graph.inputs


def _run(results: Results, cpu: str, name: str) -> Arm64Run:
    result = results[cpu, name]
    if isinstance(result, Arm64Error):
        raise result
    return result


@pytest.mark.parametrize("cpu", CPUS)
def test_the_worker_runs_on_aarch64_with_the_installed_onnxruntime(op_results: Results, cpu: str) -> None:
    run = _run(op_results, cpu, "Gelu")
    assert run.machine == "aarch64"
    assert platform.machine() == "x86_64"
    assert run.version == version("onnxruntime")
    assert run.peak_rss_bytes > run.session_rss_bytes > 0


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("cpu", CPUS)
def test_operator_agrees_with_x86(op_results: Results, op_models: dict[str, Path], cpu: str, name: str) -> None:
    agreement = judge(_run(op_results, cpu, name), op_models[name], _graph_inputs(name))
    assert agreement.quantised == GRAPHS[name].quantised
    agreement.check()
    # Single operators round identically once the kernels' ways are known: far below what whole models may show.
    assert max(gap.measured for gap in agreement.gaps) < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_what_x86_refuses_arm64_refuses(op_results: Results, op_models: dict[str, Path], name: str) -> None:
    with pytest.raises(Exception, match=r"ONNXRuntimeError"):
        run_case(str(op_models[name]), _graph_inputs(name))
    with pytest.raises(UnsupportedOnArm64Error, match=name):
        _run(op_results, CPUS[0], name)


def test_portable_kernels_round_as_x86_does(arm64_root: Arm64Root, op_models: dict[str, Path]) -> None:
    names = [name for name in RUNNING if name.startswith("MatMulNBits-") and "block32" in name]
    cases = [Case(op_models[name], _graph_inputs(name), config=PORTABLE_KERNELS) for name in names]
    for name, run in zip(names, arm64_root.run_many(cases), strict=True):
        assert isinstance(run, Arm64Run)
        agreement = judge(run, op_models[name], _graph_inputs(name), config=PORTABLE_KERNELS)
        assert not agreement.packed
        assert max(gap.plain for gap in agreement.gaps) < 1e-4


def test_packed_kernels_round_in_their_own_way(op_results: Results, op_models: dict[str, Path]) -> None:
    """Why `variants` exists: when onnxruntime changes these kernels, this says so and the module can go."""
    name = "MatMulNBits-4bit-block32-7rows"
    agreement = judge(_run(op_results, CPUS[0], name), op_models[name], _graph_inputs(name))
    assert agreement.packed
    assert agreement.gaps[0].plain > 1e-3 > agreement.gaps[0].measured


def test_external_data_beside_the_model_is_found(arm64_root: Arm64Root, tmp_path: Path) -> None:
    """One quantised layer saved as the exporters save: compared through the same call as whole artifacts are."""
    name = "MatMulNBits-4bit-block64-7rows"
    model = onnx.ModelProto()
    model.CopyFrom(GRAPHS[name].model)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert (tmp_path / "model.onnx.data").exists()
    agreement = compare_with_x86(arm64_root, path, _graph_inputs(name))
    agreement.check()
    assert agreement.packed
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("artifact", ["minilm_arm64_artifact", "minilm_arm64_factored", "minilm_arm64_fp32"])
def test_minilm_agrees(arm64_root: Arm64Root, artifact: str, cpu: str, request: pytest.FixtureRequest) -> None:
    agreements = check_encoder(arm64_root, request.getfixturevalue(artifact), cpu=cpu)
    assert agreements[0].quantised == ("fp32" not in artifact)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("artifact", ["stories_arm64_artifact", "stories_arm64_fp32"])
def test_stories_agrees(arm64_root: Arm64Root, artifact: str, cpu: str, request: pytest.FixtureRequest) -> None:
    agreements = check_decoder(arm64_root, request.getfixturevalue(artifact), cpu=cpu)
    assert agreements[0].quantised == ("fp32" not in artifact)


def test_an_unknown_operator_is_reported_with_its_name(arm64_root: Arm64Root, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(GRAPHS["QuickGelu"].model)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "unknown.onnx")
    with pytest.raises(UnsupportedOnArm64Error, match=r"unknown\.onnx on arm64 .*NoSuchOperator"):
        arm64_root.run_onnx(tmp_path / "unknown.onnx", _graph_inputs("QuickGelu"))


def test_chosen_outputs_and_a_time_limit(arm64_root: Arm64Root, op_models: dict[str, Path]) -> None:
    model = op_models["SkipLayerNormalization"]
    run = arm64_root.run_onnx(model, _graph_inputs("SkipLayerNormalization"), fetch=("sum",))
    assert list(run.outputs) == ["sum"]
    with pytest.raises(Arm64Error, match=r"no result on arm64 after 0 s"):
        arm64_root.run_onnx(model, _graph_inputs("SkipLayerNormalization"), timeout_s=0.01)


def test_a_cpu_that_the_emulator_does_not_know_is_an_error(arm64_root: Arm64Root, op_models: dict[str, Path]) -> None:
    with pytest.raises(Arm64Error, match=r"start of the arm64 worker: .*no-such-cpu"):
        arm64_root.run_onnx(op_models["Gelu"], _graph_inputs("Gelu"), cpu="no-such-cpu")


def test_gaps_see_what_must_not_pass() -> None:
    ones = np.ones((2, 3), dtype=np.float32)
    assert max_gap(ones * np.float32(1.5), ones) == pytest.approx(0.5)
    assert max_gap(ones[:1], ones) == float("inf")
    assert max_gap(ones * np.float32("nan"), ones) == float("inf")
    assert not Gap("y", float("nan"), 1.0, 0.0).ok


def test_no_tools_means_out_of_reach_and_nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackagesOutOfReachError, match=r"no apt-get here"):
        ensure_root(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["arm64-root.lock"]


def test_unreachable_packages_mean_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "apt.conf"
    config.write_text('Dir::Etc::sourcelist "/dev/null"; Dir::Etc::sourceparts "/dev/null";', encoding="utf-8")
    monkeypatch.setenv("APT_CONFIG", str(config))
    with pytest.raises(PackagesOutOfReachError, match=r"out of reach: apt-get install ended with 100"):
        ensure_root(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["arm64-root.lock"]


def test_a_root_without_a_python_is_broken_not_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"expected one python3\.N"):
        python_command(tmp_path, CPUS[0])
