"Preflight: what would stop a lab's runs is a red line that ends papermill with an error."
import pytest
import yaml

from embedlab import estimate
from embedlab.config import InputError
from embedlab.estimate import check, dependencies, disk_space, whole_checkpoints


@pytest.fixture
def presets(tmp_path, small) -> str:
    "Two preset files, the second of which asks for a set that isn't there."
    for name, more in {"good": {}, "gone": {"train": str(tmp_path / "nothing")}}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({k: str(v) if k in ("base", "train", "evaluate") else v for k, v in small.items()} | more))
    return f"{tmp_path}/good.yaml", f"{tmp_path}/gone.yaml"


def shown(ran) -> str: return "".join(str(o.get("data", {}).get("text/html", "")) + o.get("text", "") for c in ran.notebook().cells for o in c.get("outputs", []))


def test_green(papermill, presets):
    ran = papermill("preflight", "preflight", presets=presets[0])
    assert ran.code == 0, ran.text
    assert "to the same weights" in shown(ran) and "✗" not in shown(ran)
    assert not [p for p in papermill.home.iterdir() if p.is_dir()], "nothing is left of the steps that were tried"


def test_a_set_that_is_missing_and_a_full_disk(papermill, presets):
    ran = papermill("preflight", "preflight", {"EMBEDLAB_MIN_FREE": str(10**18)}, presets=",".join(presets))
    assert ran.code != 0
    error, = ran.errors()
    assert error.evalue.startswith("2 of 5 checks failed") and "nothing" in error.evalue and "are free, a run needs" in error.evalue
    assert shown(ran).count("✗") == 2


def test_the_labs_presets_are_planned_as_they_would_be_scored():
    "Sets without a dev split are in every preset of a lab: nothing is scored here, so they stop nothing."
    from embedlab.config import make_config
    from embedlab.sweeping import SweepConfig, plan
    for fixed, split in (({}, "test"), ("split=dev; epochs=1", "dev")):
        seen = []
        def look(settings, **kw): seen.append(settings); raise InputError("seen")
        with pytest.MonkeyPatch.context() as m:
            m.setattr(estimate, "estimate", look)
            estimate.preflight(make_config(estimate.PreflightConfig, presets="isotropy/baseline", fixed=fixed))
        assert [x.split for x in seen] == [split]
    assert plan(make_config(SweepConfig, presets=["isotropy/baseline"]))[0].settings.split == "dev", "a sweep is for choices"


def test_a_version_conflict(monkeypatch):
    real = estimate.metadata.version
    monkeypatch.setattr(estimate.metadata, "version", lambda name: "4.57.0" if name == "transformers" else real(name))
    line = check("versions", dependencies)
    assert not line.good and "transformers is 4.57.0, not >=5" in line.said


def test_a_damaged_checkpoint(papermill, small, monkeypatch):
    from embedlab.checkpoints import checkpoints
    assert papermill("cut", run="cut", keep="every", checks=2, **small).code == 0
    monkeypatch.setenv("EMBEDLAB_RUNS", str(papermill.home))
    assert "2 of interrupted runs, all whole" in check("checkpoints", whole_checkpoints).said
    weights = next(checkpoints(papermill.home / "cut/checkpoints")[0].rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    line = check("checkpoints", whole_checkpoints)
    assert not line.good and "is damaged (" in line.said and "remove it" in line.said
