"""The part of image-test.sh that reads pip's configuration, runs the image and calls its API. Standard library only."""

from __future__ import annotations

import ast
import configparser
import hashlib
import http.client
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HOST, PORT = "127.0.0.1", 8080
BASE_MODEL = "SmolLM2-135M-Instruct"
START_S, JOB_S, STOP_S = 60, 480, 30

# Options that decide where pip finds packages; others (targets, caches, colors) belong to the calling user.
PIP_OPTIONS = (
    "index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "client-cert", "proxy",
    "constraint", "timeout", "default-timeout", "retries",
)  # fmt: skip


def write_pip_config(target: Path) -> dict[str, Path]:
    """Writes pip's configuration to `target`; returns its local paths, by their names below /mnt in `target`.

    For an index at file:///path/simple the parent directory is mounted, because the index usually links to ../../files.
    """
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    options: dict[str, str] = {}
    # Sorted so that the environment comes after pip's files: the last value wins, as in pip.
    for line in sorted(listing.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        option = key.rpartition(".")[2]
        if option in PIP_OPTIONS:
            options[option] = str(ast.literal_eval(value))
    mounts: dict[str, Path] = {}

    def moved(word: str) -> str:
        path = Path(urlsplit(word).path if word.startswith("file://") else word)
        if not path.is_absolute() or not path.exists():
            return word
        if not word.startswith("file://"):
            mounts[name := str(len(mounts))] = path
            return f"/mnt/{name}"
        mounts[name := str(len(mounts))] = path.parent
        return f"file:///mnt/{name}/{path.name}"

    config = configparser.RawConfigParser()
    config["global"] = {option: " ".join(moved(word) for word in value.split()) for option, value in options.items()}
    with target.open("w") as file:
        config.write(file)
    return mounts


class Image:
    """A mounted image: runs commands in it with its own user, environment and working directory."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.log = directory / "log"
        self.config: dict[str, Any] = json.loads((directory / "inspect.json").read_text())["Docker"]["config"]
        self.uid = int(self.config["User"].partition(":")[0])

    def argv(self, *command: str) -> list[str]:
        return [
            "/usr/sbin/chroot", f"--userspec={self.config['User']}", "--groups=", str(self.root),
            "/usr/bin/setpriv", "--no-new-privs",
            "/usr/bin/env", "-i", f"--chdir={self.config['WorkingDir']}", *self.config["Env"], *command,
        ]  # fmt: skip

    def has_torch(self) -> bool:
        return any(self.root.glob("opt/venv/lib/python3*/site-packages/torch"))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.argv(*command), capture_output=True, text=True, check=False)

    def start(self) -> subprocess.Popen[bytes]:
        """The process of the image's command, once the image's health check passes. Its output goes to `log`."""
        with self.log.open("wb") as log:
            process = subprocess.Popen(self.argv(*self.config["Cmd"]), stdout=log, stderr=log)
        kind, *health_check = self.config["Healthcheck"]["Test"]
        assert kind == "CMD", kind
        deadline = time.monotonic() + START_S
        while self.run(*health_check).returncode != 0:
            if process.poll() is not None:
                sys.exit(f"{self.config['Cmd']} ended with {process.returncode} before it was healthy")
            if time.monotonic() > deadline:
                sys.exit(f"{self.config['Cmd']} is not healthy after {START_S} s")
            time.sleep(0.5)
        return process

    def first_key(self) -> str:
        """The admin key that the first start printed."""
        match = re.search(r"export QLORA_API_KEY=(\S+)", self.log.read_text())
        require(match, "the first start printed no key")
        assert match is not None
        return match[1]

    def processes(self) -> dict[int, str]:
        """Command lines of the user's processes, by pid, without zombies."""
        ps = subprocess.run(
            ["/bin/ps", "-U", str(self.uid), "-o", "pid=,stat=,args="], capture_output=True, text=True, check=False
        )
        rows = (line.split(maxsplit=2) for line in ps.stdout.splitlines())
        return {int(pid): command for pid, state, command in rows if not state.startswith("Z")}

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Sends the image's stop signal; returns when the command and all its children have ended cleanly."""
        stopped_at = time.monotonic()
        process.send_signal(signal.Signals[self.config["StopSignal"]])
        while process.poll() is None or self.processes():
            require(time.monotonic() - stopped_at < STOP_S, f"still running after {STOP_S} s: {self.processes()}")
            time.sleep(0.1)
        code = process.returncode
        require(code in (0, -signal.SIGTERM), f"exit code {code} after {self.config['StopSignal']}")
        print(f"   stopped in {time.monotonic() - stopped_at:.1f} s with exit code {code}")


def require(condition: object, failure: str) -> None:
    if not condition:
        sys.exit(f"image-test: {failure}")


def request(
    method: str, path: str, body: Any = None, *, key: str | None = None, status: int | None = None
) -> tuple[http.client.HTTPMessage, bytes]:
    """Headers and body of the response; ends the test unless its status is `status`, or below 300 by default."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=60)
    payload = None if body is None else json.dumps(body)
    headers = {} if payload is None else {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    connection.request(method, path, payload, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    expected = response.status < 300 if status is None else response.status == status
    require(expected, f"{method} {path} answered {response.status}: {content[:2000]!r}")
    return response.headers, content


def check_confinement(image: Image) -> None:
    """Checks that the user is 10001 and can write to /tmp and /data only, and that the root is read-only."""
    require(image.uid == 10001, f"the image's user is {image.uid}")
    for path in ("/tmp/probe", "/data/probe"):  # noqa: S108 - in the image
        result = image.run("sh", "-c", 'touch "$0" && rm "$0"', path)
        require(result.returncode == 0, f"cannot write {path}: {result.stderr}")
    for path in ("/probe", "/app/probe", "/opt/venv/probe", "/etc/probe"):
        require(image.run("touch", path).returncode != 0, f"the image's user can write {path}")
    as_root = subprocess.run(
        ["/usr/sbin/chroot", str(image.root), "touch", "/probe"], capture_output=True, text=True, check=False
    )
    require("Read-only file system" in as_root.stderr, f"the root is not read-only: {as_root.stderr}")
    for leftover in ("etc/pip.conf", "root/.cache/pip", "requirements", "source"):
        path_in_image = image.root / leftover
        require(not path_in_image.exists(), f"/{leftover} is in the image")


def check_api(image: Image) -> None:
    """Checks that the api image has no torch, serves the API and stops."""
    check_confinement(image)
    require(not image.has_torch(), "torch is in the api image")
    process = image.start()
    print(f"   /healthz: {request('GET', '/healthz')[1].decode()}")
    require(len(request("GET", "/docs/swagger-ui-bundle.js")[1]) > 0, "the script of /docs is empty")
    request("GET", "/jobs", status=401)
    request("GET", "/jobs", key=image.first_key())
    image.stop(process)


def train(spec: dict[str, Any], key: str) -> dict[str, Any]:
    """The finished job."""
    job: dict[str, Any] = json.loads(request("POST", "/jobs", spec, key=key)[1])
    deadline = time.monotonic() + JOB_S
    while job["status"] in ("queued", "running"):
        require(time.monotonic() < deadline, f"not finished after {JOB_S} s: {job}")
        time.sleep(1)
        job = json.loads(request("GET", f"/jobs/{job['id']}", key=key)[1])
    require(job["status"] == "succeeded", f"the job ended as {job['status']}: {job.get('error')}")
    return job


def check_artifacts(job_id: str, key: str) -> None:
    """Checks that every file of the manifest can be downloaded with its hash, and that the adapter has LoRA weights."""
    artifacts = f"/jobs/{job_id}/artifacts"
    manifest = json.loads(request("GET", f"{artifacts}/manifest.json", key=key)[1])
    files: dict[str, bytes] = {}
    for file in manifest["files"]:
        headers, content = request("GET", f"{artifacts}/{file['name']}", key=key)
        digest = hashlib.sha256(content).hexdigest()
        require(len(content) == file["bytes"], f"{file['name']}: {len(content)} bytes, not {file['bytes']}")
        require(digest == file["sha256"], f"{file['name']}: SHA-256 {digest}, not {file['sha256']}")
        require(digest in (headers["ETag"] or ""), f"{file['name']}: ETag {headers['ETag']} has another hash")
        files[file["name"]] = content
    base_model = json.loads(files["adapter_config.json"])["base_model_name_or_path"]
    require(base_model == BASE_MODEL, f"the adapter's base model is {base_model!r}, not {BASE_MODEL!r}")
    adapter = files["adapter_model.safetensors"]
    (header_bytes,) = struct.unpack_from("<Q", adapter)
    header: dict[str, Any] = json.loads(adapter[8 : 8 + header_bytes])
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    require(any("lora_B" in name for name in tensors), f"no LoRA tensors: {list(tensors)[:5]}")
    end = max(tensor["data_offsets"][1] for tensor in tensors.values())
    require(8 + header_bytes + end == len(adapter), "the tensors do not fill adapter_model.safetensors")
    print(f"   {len(files)} files verified, {len(tensors)} LoRA tensors, {len(adapter)} bytes")


def run_job(image: Image) -> None:
    """Checks that the image imports a model, trains on it, serves the adapter and stops."""
    check_confinement(image)
    require(image.has_torch(), "torch is not in the image")
    compiled = image.run("sh", "-c", "echo '#include <stdio.h>' | gcc -shared -fPIC -xc - -o /data/probe.so")
    require(compiled.returncode == 0, f"triton would find no working gcc: {compiled.stderr}")
    (image.root / "data/probe.so").unlink()
    process = image.start()
    (weights,) = (image.root / "mnt").glob("*.gguf")
    imported = image.run("qlora", "models", "import", BASE_MODEL, f"/mnt/{weights.name}")
    require(imported.returncode == 0, f"models import failed: {imported.stdout}{imported.stderr}")
    rows = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}."} for n in range(16)]
    started_at = time.monotonic()
    job = train(
        {
            "base_model": BASE_MODEL,
            "dataset": {"rows": rows},
            "validation": {"fraction": 0.25},
            "adapter": {"r": 4},
            "training": {"batch_size": 4, "max_steps": 2, "max_seq_len_tokens": 64},
        },
        key := image.first_key(),
    )
    print(f"   job {job['id']} succeeded in {time.monotonic() - started_at:.0f} s")
    check_artifacts(job["id"], key)
    image.stop(process)
    owners = {path.lstat().st_uid for path in (image.root / "data").rglob("*")}
    require(owners == {image.uid}, f"files in /data belong to {owners}")


if __name__ == "__main__":
    action, argument = sys.argv[1], Path(sys.argv[2])
    if action == "pip-config":
        os.umask(0o077)  # an index URL may carry a password
        for name, source in write_pip_config(argument).items():
            print(f"{name}\t{source}")
    else:
        {"check-api": check_api, "run-job": run_job}[action](Image(argument))
