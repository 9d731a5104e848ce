"""Passwords, and what comes from the environment, are neither printed nor recorded."""

import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nai_xl import config
from nai_xl.config import cli
from nai_xl.errors import UserError, one_line
from nai_xl.record.config import read_config, write_config, write_params
from nai_xl.redact import redacted
from nai_xl.tracker.mlflow.delivery import Delivery, Progress
from nai_xl.tracker.mlflow.store import VARIABLE, run_page, with_login
from nai_xl.tracker.mlflow.tracker import MlflowTracker

URI = "http://anna:geh@im@host:5000"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"cannot open {URI}/api: no", "cannot open http://***@host:5000/api: no"),
        ("mysql+pymysql://u:p@h/db?password=abc&x=1", "mysql+pymysql://***@h/db?password=***&x=1"),
        (
            "https://h/a.tar?X-Amz-Credential=k%2F1&X-Amz-Signature=s&v=2",
            "https://h/a.tar?X-Amz-Credential=***&X-Amz-Signature=***&v=2",
        ),
        ("https://h/a.tar?sv=1&sig=geheim%3D", "https://h/a.tar?sv=1&sig=***"),
        ("sqlite:////data/a@b/mlflow.db and http://host/a@b", "sqlite:////data/a@b/mlflow.db and http://host/a@b"),
    ],
)
def test_a_login_is_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == one_line(ValueError(text)) == shown


def test_mlflows_password_is_hidden_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "geheim")
    assert redacted("401 for geheim") == "401 for ***"


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "geheim")
    keys = "https://h/{0..9}.tar?sig=geheim&page=2"
    cfg = config.compose(
        [
            "data=shards",
            f"data.files=['{keys}','s3://anna:geheim@b/x']",
            f"tracker.uri='{URI}'",
            "tracker.experiment=${oc.env:SECRET}",
            "name=${tracker.experiment}",
        ]
    )
    write_config(tmp_path, cfg)
    write_params(tmp_path, config.flat(cfg), {})
    Delivery(tmp_path, URI, "mine")
    told = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "geh" not in told and "anna" not in told
    assert config.flat(cfg)["tracker.experiment"] == config.flat(cfg)["name"] == "${oc.env:SECRET}"
    assert json.loads((tmp_path / "mlflow.json").read_text())["uri"] == "http://***@host:5000"


def test_a_stored_variable_is_read_where_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "geheim")
    write_config(tmp_path, OmegaConf.create({"a": "${oc.env:SECRET}/x", "b": "${a}", "c": "${oc.env:NONE,5}"}))
    assert OmegaConf.to_container(read_config(tmp_path), resolve=True) == {"a": "geheim/x", "b": "geheim/x", "c": "5"}
    monkeypatch.delenv("SECRET")
    stored = OmegaConf.to_container(read_config(tmp_path), resolve=True)
    assert stored == {"a": "${oc.env:SECRET}/x", "b": "${oc.env:SECRET}/x", "c": "5"}


def test_a_password_that_changes_keeps_the_run_of_mlflow(tmp_path: Path) -> None:
    first = Delivery(tmp_path, URI, "mine").progress
    assert Delivery(tmp_path, "http://bert:other@host:5000", "mine").progress.token == first.token
    old = tmp_path / "mlflow.json"
    old.write_text(json.dumps({"uri": URI, "experiment": "mine", "token": "t"}))  # as earlier versions wrote it
    assert Delivery(tmp_path, URI, "mine").progress.token == "t"
    Progress("http://anna:geh@host", "mine", "t").write(tmp_path)
    assert "anna" not in old.read_text()


def test_a_recorded_address_gets_its_login_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = redacted(URI)
    with pytest.raises(UserError, match=VARIABLE):
        with_login(recorded)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    assert with_login(recorded) == "http://host:5000"
    monkeypatch.setenv(VARIABLE, URI)
    assert with_login(recorded) == URI
    assert MlflowTracker.described() == f"{recorded} ({VARIABLE})" and "anna" not in run_page(URI, "1", "2")


def test_an_error_names_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", f"tracker.uri='{URI}", "+nothing=1"])  # a quote is missing
    with pytest.raises(SystemExit):
        cli.entry_point(lambda cfg, choices: None)()
    told = capsys.readouterr().err
    assert "***@host" in told and "geh" not in told
