"""Every YAML is a test: all options, sweeps and documented commands compose and become objects."""

from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from recon.config import CONF, GROUPS, SWEEPS, Config, check, option, options, register, to_config
from recon.errors import ReconError, Refused
from recon.sources.webcams import quote_devices

ROOT = Path(__file__).parent.parent
ALL_OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
DESIGN_COMMANDS = [
    "",
    "+quant=modelopt-fp8 precision=int8",
    "quant_mode=modelopt-fp8 precision=fp16",
    "source=images source.path=DIR",
    "source=videos source.path=DIR source.views=[cam_0,cam_2] source.frame_step=2 fusion=surfel",
    "source=videos source.path=DIR source.random_views=3 source.intrinsics=K.npz source.poses=P.npz",
    "source=webcams source.devices=[front=0,left=1]",
    "source=webcams source.devices=[0,1,2]",
    "stages=[benchmark] benchmark.engine=PATH",
    "stages=[benchmark] benchmark.root=outputs/engines",
    "model=vggt-1b model.views=8 model.height=518 model.width=518 model.pcd_only=true engine=tensorrt precision=fp16 stages=[export,build,benchmark]",
    "stages=[benchmark] benchmark.co_run=[A.engine,B.engine] benchmark.every=[1,3]",
    "plan=true",
    "depth.workers=2 depth.input_size=14 depth.every=2 align.smooth_scale=0.1 align.per_camera_calib=FILE",
    "fresh_bootstrap=true save_per_frame_depth=true viewer=rerun",
    "stages=[reconstruct,handover] viewer=rerun rerun.spawn=true",
    "stages=[handover] handover.run=DIR handover.center=true",
    "stages=[depth] depth_video.codec=mpeg4 depth_video.save=png16",
]


@pytest.fixture(scope="module", autouse=True)
def hydra_dir():
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@cache
def composed(*overrides: str, check_it: bool = False) -> Config:
    """To be read only: what was composed once is given again."""
    from omegaconf import OmegaConf

    config = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    choices = dict(HydraConfig.get().runtime.choices)
    del config.__dict__["_content"]["hydra"]
    if check_it:
        return to_config(config, choices)
    found = OmegaConf.to_object(config)
    assert isinstance(found, Config)
    return found


@pytest.mark.parametrize(("group", "name"), ALL_OPTIONS)
def test_every_option_becomes_an_object_that_knows_its_name(group: str, name: str) -> None:
    needs = {"images": ["source.path=X"], "videos": ["source.path=X"]}.get(name, [])
    found = getattr(composed(f"{group}={name}", *needs), group)
    assert found.name == name
    assert type(found).__doc__
    assert found.settings()["name"] == name


@pytest.mark.parametrize(("group", "name"), ALL_OPTIONS)
def test_option_function_agrees_with_composition(group: str, name: str) -> None:
    if name in ("images", "videos"):
        pytest.skip("their path is required, so there is no object without one")
    assert option(group, name).settings() == getattr(composed(f"{group}={name}"), group).settings()


def test_one_dataclass_per_option_module() -> None:
    for group, (package, base) in GROUPS.items():
        modules = [module for module, _ in options(package, base)]
        assert len(modules) == len(set(modules)), f"{group}: a module holds two options"


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_composes_and_every_axis_value_too(path: Path) -> None:
    config = compose("config", overrides=[f"+sweep={path.stem}"], return_hydra_config=True)
    assert config.name == path.stem
    axes = config.hydra.sweeper.params
    assert axes, "a sweep without an axis is a config"
    for key, values in axes.items():
        for value in str(values).split(","):
            assert isinstance(composed(f"+sweep={path.stem}", f"{key}={value}"), Config)


@pytest.mark.parametrize("command", DESIGN_COMMANDS)
def test_every_command_of_the_design_composes(command: str) -> None:
    assert isinstance(composed(*map(quote_devices, command.split())), Config)


def test_named_devices_arrive_as_typed() -> None:
    assert composed(*map(quote_devices, ["source=webcams", "source.devices=[front=0,left=1]"])).source.settings()[
        "devices"
    ] == ["front=0", "left=1"]


def test_sweep_axes_parse_word_for_word() -> None:
    parsed = OverridesParser.create().parse_overrides(
        ["quant_mode=none,modelopt-fp8", "precision=fp16,int8", "+sweep=all-quant-modes"]
    )
    assert [item.is_sweep_override() for item in parsed] == [True, True, False]


def test_the_default_passes_every_check() -> None:
    composed(check_it=True)


def test_quant_alias_is_the_same_switch() -> None:
    assert (
        composed("+quant=modelopt-fp8").quant_mode.settings()
        == composed("quant_mode=modelopt-fp8").quant_mode.settings()
    )
    with pytest.raises(ReconError, match="contradicts"):
        composed("+quant=modelopt-fp8", "quant_mode=none", check_it=True)


@pytest.mark.parametrize(
    ("override", "near"),
    [("+fuson=1", "fusion"), ("+source.hieght=3", "source.height"), ("+align.smooth=1", "align.smooth_scale")],
)
def test_unknown_plus_keys_are_refused_with_the_nearest(override: str, near: str) -> None:
    with pytest.raises(ReconError, match="unknown key") as caught:
        composed(override, check_it=True)
    assert near in caught.value.remedy


@pytest.mark.parametrize(
    ("command", "nearest"),
    [
        ("precision=bf16", "quant_mode=none precision=fp16"),
        ("quant_mode=modelopt-nvfp4", "quant_mode=none precision=fp32"),
        ("quant_mode=bitsandbytes-nf4 precision=bf16", "quant_mode=bitsandbytes-nf4 precision=fp16"),
    ],
)
def test_a_pair_that_cannot_run_is_refused_with_the_nearest_that_can(command: str, nearest: str) -> None:
    with pytest.raises(Refused) as caught:
        composed(*command.split(), check_it=True)
    assert "engine=onnxruntime" in caught.value.problem
    assert caught.value.remedy.endswith(nearest)
    assert "\n" not in caught.value.problem
    composed(*nearest.split(), check_it=True)


@pytest.mark.parametrize(
    "override",
    [
        "stages=[exprot]",
        "stages=[]",
        "fusion.voxel=0",
        "depth.every=0",
        "depth.workers=-1",
        "name=",
        "output=",
        "source=images source.path=",
        "source=images source.path=D source.intrinsics=",
        "source=videos source.path=V source.rig=",
        "source=webcams source.poses=",
        "name=a/b",
        "name=..",
        "scale.columns=6",
        "scale.dictionary=DICT_4X4_50",
        "scale.columns=6 scale.rows=5 scale.square_m=0.1 scale.marker_m=0.05 scale.dictionary=DICT_NONE",
        "scale.columns=6 scale.rows=5 scale.square_m=0.1 scale.marker_m=0.05 scale.dictionary=Board",
        "scale.baseline=[a,b] scale.baseline_m=-1",
        "evaluate.threshold=-1",
        "evaluate.max_points=0",
        "fusion.voxel=inf",
        "fusion.min_weight=99",
        "fusion=surfel fusion.radius=-1",
        "evaluate.reference=none.npz",
    ],
)
def test_impossible_values_are_refused(override: str) -> None:
    with pytest.raises(ReconError) as caught:
        check(composed(*override.split()))
    assert caught.value.remedy
    assert override.partition("=")[0].partition(".")[0].rstrip("s") in caught.value.problem
