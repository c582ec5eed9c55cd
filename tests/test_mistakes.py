"""What is mistyped on the command line: the argument as it was typed, and a remedy that works."""

import ast
import errno

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recon.config import CONF, register
from recon.errors import ReconError
from recon.mistakes import explain

REFUSALS = ("ReconError", "Refused", "Unwritable")


@pytest.fixture(scope="module", autouse=True)
def hydra_dir():
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def said(*arguments: str) -> ReconError:
    try:
        OmegaConf.to_object(compose("config", overrides=list(arguments)))
    except Exception as error:
        return explain(error, arguments)
    raise AssertionError(f"{arguments} composed")


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        ("engin=torch", "engin=torch: no such key", "did you mean engine?"),
        ("engine=tensort", "engine=tensort: no such option", "did you mean tensorrt? options: inductor, "),
        ("+sweep=smok", "sweep=smok: no such option", "did you mean smoke?"),
        ("model.widht=56", "model.widht=56: no such key", "did you mean model.width? known: name, "),
        ("engine=torch engine.provider=cuda", "engine.provider=cuda: no such key", "it belongs to engine=onnxruntime;"),
        ("source.path=DIR", "source.path=DIR: no such key", "it belongs to source=images, source=videos;"),
        ("engine=torch engine.profiles=[]", "engine.profiles=[]", "engine=onnxruntime, engine=tensorrt, engine=tensor"),
        ("model.width=wide", "model.width=wide: Value 'wide'", "it is a whole number"),
        ("source=videos source.path=D source.end_s=x", "source.end_s=x: Value 'x'", "it is a number or null"),
        ("plan=perhaps", "plan=perhaps: Value 'perhaps'", "it is true or false"),
        ("stages=build", "stages=build: Invalid value", "it is a list: stages=[build]"),
        ("depth.image_size=[a,b]", "depth.image_size=[a,b]: Value 'a'", "--cfg job"),
        ("evaluate=all", "evaluate=all: Invalid type", "--cfg job"),
        ("source=images", "source.path has no value", "give source.path=..."),
        ("stages=[export,", "stages=[export,: cannot be read", "without blanks, in lists, too"),
        ("demo", "demo: cannot be read", "give key=value"),
        ("source.path=~/a", "source.path=~/a: cannot be read", "source.path=$HOME/a"),
        ("source.path=a=b", "source.path=a=b: cannot be read", "'source.path=\"a=b\"'"),
        ("source.path=Küche", "source.path=Küche: cannot be read", "'source.path=\"Küche\"'"),
        ("fusion=tsdf,surfel", "fusion=tsdf,surfel: several values", "python -m recon -m fusion=tsdf,surfel"),
        ("fusion.voxel=1,2", "fusion.voxel=1,2: several values", "'fusion.voxel=\"1,2\"' for one value"),
        ("quant=none", "quant=none: quant is added", "write +quant=none"),
        ("sweep=smoke", "sweep=smoke: sweep is added", "write +sweep=smoke"),
        ("+engine=torch", "Multiple values for engine", "leave the + out"),
        ("+fusion.voxel=1", "An item is already at 'fusion.voxel'", "leave the + out"),
        ("tracking=null", "tracking=null: a group takes", "options: mlflow, none"),
        ("++engine=torch", "force-add of config groups is not supported", "--help"),
    ],
)
def test_the_argument_the_rule_and_the_remedy(arguments: str, problem: str, remedy: str) -> None:
    found = said(*arguments.split())
    assert problem in found.problem
    assert remedy in found.remedy
    assert "\n" not in str(found).replace("\n  remedy: ", "", 1)


def test_remedies_that_are_arguments_compose() -> None:
    for argument in ("+quant=none", "+sweep=smoke", "stages=[build]", "model.width=56", "tracking=none"):
        compose("config", overrides=[argument])
    for path in ("Küche", "a=b", "a,b", "x(1)"):
        quoted = said("source=images", f"source.path={path}").remedy.partition("'")[2].partition("'")[0]
        assert compose("config", overrides=["source=images", quoted]).source.path == path


def test_an_output_folder_that_cannot_be_made() -> None:
    found = explain(OSError(errno.EROFS, "Read-only file system", "results/runs"), [])
    assert found.problem == "results/runs: Read-only file system"
    assert "output=DIR" in found.remedy


def test_every_refusal_has_a_remedy() -> None:
    """`Damaged` needs none: what is damaged is rebuilt."""
    bare = []
    for file in sorted((CONF.parent / "recon").rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in REFUSALS:
                given = [*call.args, *(word.value for word in call.keywords)]
                told = any(isinstance(part, ast.Starred) for part in given) or len(given) > 1
                if not told or (isinstance(given[-1], ast.Constant) and not given[-1].value):
                    bare.append(f"{file.name}:{call.lineno}")
    assert bare == []


def test_own_errors_stay_as_they_are() -> None:
    own = ReconError("a=1: a rule", "a=2")
    assert explain(own, ["a=1"]) is own
