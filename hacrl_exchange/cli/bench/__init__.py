"""`hacrl bench ...`: measures an exchange on this machine."""

from __future__ import annotations
