"""Puts pip into the environment of the Python that runs this, where neither ensurepip nor another pip can.

A pip wheel runs as it is, so it can install itself. The package index is PIP_INDEX_URL, else PyPI.
"""

import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request

page = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
links = re.findall(
    r'href="([^"]*/pip-(\d+)\.(\d+)(?:\.(\d+))?-py3-none-any\.whl[^"]*)"', urllib.request.urlopen(page).read().decode()
)
link = max(links, key=lambda found: [int(part or 0) for part in found[1:]])[0].partition("#")[0]
with tempfile.TemporaryDirectory() as folder:
    wheel = os.path.join(folder, os.path.basename(urllib.parse.urlparse(link).path))
    urllib.request.urlretrieve(urllib.parse.urljoin(page, link), wheel)
    subprocess.run([sys.executable, f"{wheel}/pip", "install", "-q", wheel], check=True)
