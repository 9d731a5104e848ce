"""Secrets are shown as ***, wherever something is printed or recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf

HIDDEN = "***"
LOGIN = re.compile(r"([a-zA-Z][\w+.-]*://)[^\s/?#'\"]*@")  # user:password@ of an address; a password may hold an @
IN_QUERY = re.compile(
    r"([?&;](?:sig|[\w-]*(?:password|passwd|pwd|token|secret|signature|credential|api_?key|access_?key(?:_?id)?))=)"
    r"[^&;\s'\"]+",
    re.IGNORECASE,
)
SECRET_KEY = re.compile(r"(^|[._])(password|passwd|secret|api_?key|(auth|access)_?token)$", re.IGNORECASE)
IN_ENVIRONMENT = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
SHORTEST = 4  # characters of a password that is looked for in a text; shorter ones are found everywhere


def redacted(text: str) -> str:
    """The text with *** for user and password of an address, for secrets in its query, and for MLflow's password."""
    text = IN_QUERY.sub(rf"\1{HIDDEN}", LOGIN.sub(rf"\1{HIDDEN}@", text))
    for name in IN_ENVIRONMENT:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return text


def without_secrets(value: Any, key: str = "") -> Any:
    """A value of a config, or a tree of them, with every text redacted, and *** for what is called a password."""
    if isinstance(value, Mapping):
        return {name: without_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, key) for item in value]
    if isinstance(value, str):
        interpolation = value.startswith("${oc.env:")
        return HIDDEN if value and SECRET_KEY.search(key) and not interpolation else redacted(value)
    return value


@contextmanager
def environment_unread() -> Iterator[None]:
    """Inside the block ${oc.env:NAME} resolves to itself: what is recorded names the variable and not its value."""
    from omegaconf.resolvers import oc

    def itself(*arguments: Any) -> str:
        return f"${{oc.env:{','.join('null' if one is None else str(one) for one in arguments)}}}"

    OmegaConf.register_new_resolver("oc.env", itself, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
