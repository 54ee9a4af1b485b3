"""Take out of a record what names a person, a machine or a key, the same thing always by the same stand-in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

SEPARATED = r"[0-9a-f]{8}(?P<sep>[-_])[0-9a-f]{4}(?P=sep)[0-9a-f]{4}(?P=sep)[0-9a-f]{4}(?P=sep)[0-9a-f]{12}"
UUID = re.compile(SEPARATED, re.IGNORECASE)
HASH = re.compile(r"\b[0-9a-f]{32,128}\b", re.IGNORECASE)
"""Identifiers of containers and the like."""
WIDE = re.compile(r"\b(?P<prefix>0x|GPU-)(?P<digits>[0-9a-f]{16})\b", re.IGNORECASE)
"""Identifiers of 64 bits, in hexadecimal."""
DECIMAL = re.compile(r"\b(?P<key>unique_id|hive_id)(?P<gap>\W{1,4})(?P<digits>\d{9,20})\b")
"""The same in decimal, as the kernel's driver for AMD writes them."""
SERIAL = re.compile(
    r"""(?P<key>\b(?:\w{0,20}serial|vdie\ id|fru\ id|asset\ tag)[\w \t()#]{0,30}["']?[ \t]*[:=][ \t]*)"""
    r"""(?P<value>"[^"\n]*"|(?!null\b|N/A\b|None\b)[^\s",}\]]+)""",
    re.IGNORECASE | re.VERBOSE,
)
MAC = re.compile(r"\b(?:[0-9a-f]{2}:){5,19}[0-9a-f]{2}\b", re.IGNORECASE)
ADDRESS_LINE = re.compile(r"^.*\b(?:ip|ipaddr|inet|address|addr|gateway|netmask)\b.*$", re.IGNORECASE | re.MULTILINE)
"""Only such lines hold network addresses; four numbers with dots are a version elsewhere."""
ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b")
HOME = re.compile(r"(?P<root>/home/|/Users/)[^/\s:\"']+")
TOKEN = re.compile(
    r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|xox[bp]-|AKIA|eyJ)[\w\-.]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=Bearer )\S+"
)
KEPT_ENV = re.compile(
    r"(CUDA|NVIDIA|NCCL|RCCL|ROCR|ROCM|HIP|HSA|AMD|GPU|ASCEND|HCCL|NPU|CANN|ZE)_\w+|container|KUBERNETES_SERVICE_HOST"
    r"|SLURM_(NNODES|NTASKS|PROCID|LOCALID|GPUS|GPUS_ON_NODE|CPUS_ON_NODE|CPUS_PER_TASK|MEM_PER_NODE|JOB_GPUS|STEP_GPUS)"
)
SECRET_ENV = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
COMMON_WORDS = {"root", "user", "host", "localhost", "nvidia", "ascend", "ubuntu", "linux", "admin", "docker", "slurm"}
"""Names that say nothing of anybody, and that tools print in other senses."""
SHORTEST_NAME = 4


class Scrubber:
    """Replace secrets in text and JSON; `names` are host and user names, each with its stand-in."""

    def __init__(self, names: Iterable[tuple[str, str]] = ()) -> None:
        wanted = [(name, word) for name, word in names if len(name) >= SHORTEST_NAME]
        self._names = [(name, word) for name, word in wanted if name.lower() not in COMMON_WORDS]
        self._numbers: dict[str, int] = {}
        self._uuids: dict[str, str] = {}

    def text(self, text: str) -> str:
        """Return text without secrets."""
        for match in re.finditer(rf"\b((?:GPU|MIG)-(?:{SEPARATED}|[0-9a-f]{{16}}))(?![0-9a-f-])", text, re.IGNORECASE):
            self._uuids[match.group(1)] = self._identifiers(match.group(1))
        text = TOKEN.sub("TOKEN", text)
        text = SERIAL.sub(_without_serial, text)
        text = self._identifiers(text)
        text = MAC.sub("00:00:00:00:00:00", text)
        text = ADDRESS_LINE.sub(lambda line: ADDRESS.sub("192.0.2.1", line[0]), text)
        text = HOME.sub(lambda found: f"{found['root']}user", text)
        for name, word in self._names:
            text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", word, text)
        return text

    def plain(self, value: Any) -> Any:
        """Return JSON values without secrets."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list | tuple):
            return [self.plain(item) for item in value]
        if isinstance(value, dict):
            return {
                self.text(key): "SERIAL" if "serial" in key.lower() else self.plain(item) for key, item in value.items()
            }
        return value

    def environment(self, env: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Return the variables that a survey may need, without secrets; call last, when all devices are known."""
        kept = {}
        for name, value in sorted(env):
            if KEPT_ENV.fullmatch(name) and not SECRET_ENV.search(name):
                kept[name] = "set" if name == "KUBERNETES_SERVICE_HOST" else self._setting(value)
        return kept

    def _named(self, key: str, value: Any) -> Any:
        return "SERIAL" if "serial" in key.lower() else self.plain(value)

    def _setting(self, value: str) -> str:
        # A visibility list may name a device by the beginning of its UUID.
        return ",".join(self._entry(part) for part in value.split(","))

    def _entry(self, entry: str) -> str:
        if not re.fullmatch(r"\s*(GPU|MIG)-[0-9a-fA-F-]+\s*", entry):
            return self.text(entry)
        meant = {new for old, new in self._uuids.items() if old.lower().startswith(entry.strip().lower())}
        return meant.pop() if len(meant) == 1 else f"{entry.strip()[:3]}-unknown"

    def _identifiers(self, text: str) -> str:
        text = UUID.sub(self._uuid, text)
        text = WIDE.sub(lambda found: found["prefix"] + self._hexadecimal(found["digits"]), text)
        text = DECIMAL.sub(self._decimal, text)
        return HASH.sub(lambda found: f"{self._number(found[0].lower()):0{len(found[0])}x}", text)

    def _uuid(self, found: re.Match[str]) -> str:
        digits = re.sub(r"[-_]", "", found[0]).lower()
        if not int(digits, 16):
            return found[0]
        parts = (f"{self._number(digits):08x}", "0000", "0000", "0000", f"{self._number(digits):012x}")
        return found["sep"].join(parts)

    def _hexadecimal(self, digits: str) -> str:
        value = int(digits, 16)
        # Masks of flags are written as wide as identifiers are.
        return digits if value < 2**32 else f"{self._wide_number(value):016x}"

    def _decimal(self, found: re.Match[str]) -> str:
        value = int(found["digits"])
        if value < 2**32:
            return found[0]
        return f"{found['key']}{found['gap']}{self._wide_number(value)}"

    def _wide_number(self, value: int) -> int:
        number = self._number(str(value))
        # ROCR_VISIBLE_DEVICES calls an AMD GPU by this number.
        self._uuids[f"GPU-{value:016x}"] = f"GPU-{number:016x}"
        return number

    def _number(self, identifier: str) -> int:
        return self._numbers.setdefault(identifier, len(self._numbers) + 1)


def _without_serial(found: re.Match[str]) -> str:
    value = found["value"]
    if value.startswith('"'):
        return f'{found["key"]}"SERIAL"'
    return found["key"] + ("0" if value.isdigit() else "SERIAL")
