"""The web demo on loopback: the built page and a package, with the headers that threads need."""

from flowexport.demo.server import DEFAULT_PORT, DemoServer, open_server, reachable_url
from flowexport.demo.site import SITE, Site, find_site

__all__ = [
    "DEFAULT_PORT",
    "SITE",
    "DemoServer",
    "Site",
    "find_site",
    "open_server",
    "reachable_url",
]
