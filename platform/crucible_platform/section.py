"""What the configuration of every component has in common. A component's own is one model in its own module."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

# Of the repository: the YAML, and the stacks' files, are read from it.
ROOT = Path(__file__).parents[2]


class Section(BaseModel):
    """One part of a stack's configuration. A key that it does not know is an error: most are a known one, misspelt."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _network(value: object) -> IPv4Network:
    if isinstance(value, IPv4Network):
        return value
    try:
        return IPv4Network(str(value), strict=True)
    except ValueError as error:
        raise ValueError(f"{error}; write the network's first address and its length, such as 10.16.0.0/16") from None


Cidr = Annotated[
    IPv4Network,
    BeforeValidator(_network),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "format": "ipv4network"}),
]
Zone = Annotated[str, Field(pattern=r"^[a-z]{2}(-[a-z]+)+-[0-9][a-z]$")]
Region = Annotated[str, Field(pattern=r"^[a-z]{2}(-[a-z]+)+-[0-9]$")]
AccountId = Annotated[str, Field(pattern=r"^[0-9]{12}$")]
