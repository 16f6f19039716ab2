"""The live page: an ASGI app that shows runs as they grow. It knows nothing of Ray and serves nothing of others."""

from esper.nissa.web.app import build_app
from esper.nissa.web.door import Door
from esper.nissa.web.serve import PageServer
from esper.nissa.web.source import FolderRuns, LiveRuns, Picture, PlatformState, Runs

__all__ = ["Door", "FolderRuns", "LiveRuns", "PageServer", "Picture", "PlatformState", "Runs", "build_app"]
