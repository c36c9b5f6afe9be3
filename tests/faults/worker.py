"""A uvicorn worker with `tests.faults.shop`, and the browsers that visit it."""

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.commands import ROOT
from tests.serving import Uvicorn


class Worker(Uvicorn):
    """The shop under uvicorn, in a process of its own, while the block runs."""

    def __init__(self, folder: Path, url: str | sa.URL, *, deadline: timedelta, options: Mapping[str, Any]) -> None:
        variables = {
            "DEADLINE": str(deadline.total_seconds()),
            "OPTIONS": json.dumps(options),
            "URL": sa.make_url(url).render_as_string(hide_password=False),
        }
        super().__init__("tests.faults.shop:app", folder, cwd=ROOT, variables=variables)
