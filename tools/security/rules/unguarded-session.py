import urllib.request

import aiohttp
import httpx
import requests
from aiohttp import ClientSession


async def refused(url, connector):
    # ruleid: unguarded-session
    aiohttp.ClientSession()
    # ruleid: unguarded-session
    ClientSession(trust_env=False)
    # ruleid: unguarded-session
    aiohttp.ClientSession(connector=connector)
    # ruleid: unguarded-session
    aiohttp.ClientSession(connector=connector, trust_env=True)
    # ruleid: unguarded-session
    await aiohttp.request("GET", url)
    # ruleid: unguarded-session
    urllib.request.urlopen(url)
    # ruleid: unguarded-session
    requests.get(url)
    # ruleid: unguarded-session
    httpx.AsyncClient()


async def allowed(connector, cookies):
    # ok: unguarded-session
    aiohttp.ClientSession(connector=connector, cookie_jar=cookies, trust_env=False)
    # ok: unguarded-session
    aiohttp.ClientTimeout(total=1)
