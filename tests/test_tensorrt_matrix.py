"""Real plans of TensorRT for RTX for both twins in every mode and precision, two builds at a time."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
from plans import MODES, PRECISIONS, Plan, base_of, built_alone, options_of, require_proof, require_tool

pytestmark = [pytest.mark.trt, pytest.mark.slow]
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'recon[trt]'")

Case = tuple[str, str, str]
CASES: list[Case] = [
    (twin, mode, precision)
    for twin in ("vggt-twin", "da2-twin")
    for mode in ("none", *MODES)
    for precision in PRECISIONS
]  # fmt: skip


@pytest.fixture(scope="module")
def plans(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, Future[Plan]]]:
    """Plans of the pairs that this session asks for, under way in two processes: TensorRT's builder takes one core."""
    folder, here = tmp_path_factory.mktemp("plans"), request.node.path
    wanted = [
        item.callspec.params["case"] for item in request.session.items if item.path == here and hasattr(item, "callspec")
    ]  # fmt: skip
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        twins = list(dict.fromkeys(case[0] for case in wanted))
        bases = dict(zip(twins, pool.map(base_of, twins, [folder] * len(twins)), strict=True))
        yield {
            case: pool.submit(built_alone, bases[case[0]], *case[1:], Path(folder, "-".join(case)))
            for case in wanted
            if usable(case[1])
        }
        pool.shutdown(cancel_futures=True)


def usable(mode: str) -> bool:
    return not options_of(mode, "fp32")[0].tool or bool(options_of(mode, "fp32")[0].tool_version())


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_pair_builds_and_is_what_was_asked_for(case: Case, plans: dict[Case, Future[Plan]]) -> None:
    require_tool(case[1])
    plan = plans[case].result()
    require_proof(plan, *case)
    judge(plan, *case)


def judge(plan: Plan, twin: str, mode: str, precision: str) -> None:
    """The certificate tells apart what this TensorRT carries out as asked from what it does otherwise."""
    found = plan.certificate
    said = f"{found['verdict']} {found['share']:.4f} {found['sentence']}"
    assert not found["lacking"], said
    if mode == "torch-int8-dynamic":  # weights stay INT8; the products are those of the rest
        assert found["verdict"] == "partial", said
        assert set(found["elsewhere"]) >= set(plan.layers), said
        return
    assert found["share"] > 0.98, said
    whole = not set(found["elsewhere"]) & set(plan.layers) and not found["without_effect"]
    assert (found["verdict"] == "achieved") == whole, said
    rest = options_of(mode, precision)[1].rest_format
    upward = {layer.compute for layer in plan.seen.layers if layer.op == "deconv"}
    assert upward <= {rest}, said  # ConvTranspose, which has to be FP32 in the graph of a BF16 network
