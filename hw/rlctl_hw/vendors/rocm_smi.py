"""`rocm-smi`, the fallback before `amd-smi` existed: parsers from its JSON and its text to facts.

Keys change their case between versions (`Card series`, `Card Series`), every value is text, `system` stands among the
cards, and the tool prints `Driver not initialized` with exit code 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rlctl_hw.host import Host, first_line
from rlctl_hw.vendors.amd_gpu import Answer, Gpu, uuid_of
from rlctl_hw.vendors.loose_json import lowered, number, parse_document, words
from rlctl_hw.vendors.tools import ROCM_FOLDERS, run_tool

QUESTIONS = (
    "--showproductname",
    "--showid",
    "--showuniqueid",
    "--showbus",
    "--showmeminfo",
    "vram",
    "--showdriverversion",
)
"""Asked one by one: `--showallinfo` aborts on ROCm 7.2."""
GIB = 2**30
CARD = re.compile(r"card(\d{1,4})")
LINE = re.compile(r"GPU\[(\d{1,4})\]\s*:\s*([^:]+?)\s*:\s*(.*)")
DRIVER_LINE = re.compile(r"Driver version:\s*(\S+)", re.IGNORECASE)
SECTION = re.compile(r"=+\s*([^=]+?)\s*=+")
COLUMN = re.compile(r"GPU(\d{1,4})")
LINK_KEY = re.compile(r"\(topology\) link type between drm devices (\d{1,4}) and (\d{1,4})")


def read(host: Host) -> Answer:
    """Ask for JSON, and for text where that brings no GPU."""
    first: str | None = None
    for arguments, parse in ((["--json"], parse_json), ([], parse_text)):
        result = run_tool(host, ["rocm-smi", *QUESTIONS, *arguments], ROCM_FOLDERS)
        answer = parse(result.stdout)
        if answer.gpus:
            return answer
        first = first or result.error or f"rocm-smi: {first_line(result.stdout) or 'said nothing'}"
        if result.code is None:
            break
    return Answer((), "rocm-smi", (first or "rocm-smi: said nothing",))


def read_links(host: Host) -> dict[tuple[int, int], str]:
    """Ask for the ways between the GPUs."""
    return parse_links(run_tool(host, ["rocm-smi", "--showtopo"], ROCM_FOLDERS).stdout)


def parse_json(text: str) -> Answer:
    """Read `rocm-smi ... --json`."""
    document = parse_document(text)
    if not isinstance(document, dict):
        return Answer((), "rocm-smi")
    cards = {}
    for key, values in document.items():
        card = CARD.fullmatch(key)
        if card and isinstance(values, dict):
            cards[int(card.group(1))] = values
    return Answer(_gpus(cards), "rocm-smi", driver=words(_lower(document.get("system")).get("driver version")))


def parse_text(text: str) -> Answer:
    """Read the lines `GPU[0] : VRAM Total Memory (B): 206141652992` of any of the tool's tables."""
    cards: dict[int, dict[str, str]] = {}
    for line in text.splitlines():
        found = LINE.match(line.strip())
        if found:
            cards.setdefault(int(found.group(1)), {})[found.group(2)] = found.group(3)
    driver = DRIVER_LINE.search(text)
    return Answer(_gpus(cards), "rocm-smi", driver=driver.group(1) if driver else None)


def parse_links(text: str) -> dict[tuple[int, int], str]:
    """Read the matrix `Link Type between two GPUs` of `--showtopo`, or its JSON: kinds by pairs of GPU indices."""
    document = parse_document(text)
    if isinstance(document, dict) and "system" in document:
        found = {LINK_KEY.fullmatch(key): kind for key, kind in _lower(document["system"]).items()}
        return {(int(key.group(1)), int(key.group(2))): str(kind).upper() for key, kind in found.items() if key}
    kinds, columns, inside = {}, [], False
    for line in text.splitlines():
        section = SECTION.fullmatch(line.strip())
        if section:
            inside, columns = section.group(1).lower().startswith("link type"), []
        elif inside and not columns:
            columns = [int(column) for column in COLUMN.findall(line)]
        elif inside:
            kinds |= _row(line.split(), columns)
    return kinds


def _row(cells: list[str], columns: list[int]) -> dict[tuple[int, int], str]:
    head = COLUMN.fullmatch(cells[0]) if cells else None
    if head is None:
        return {}
    pairs = zip(columns, cells[1:], strict=False)
    return {(int(head.group(1)), other): kind.upper() for other, kind in pairs if kind.isalpha()}


def _gpus(cards: Mapping[int, Mapping[str, object]]) -> tuple[Gpu, ...]:
    return tuple(_gpu(index, _lower(values)) for index, values in sorted(cards.items()))


def _gpu(index: int, card: dict[str, object]) -> Gpu:
    names = [words(card.get(key)) for key in ("card series", "device name", "card model")]
    # Tools that lack the name database print the vendor's or the card's number in its place.
    name = next((name for name in names if name and not name.lower().startswith("0x")), None)
    memory, serial = number(card.get("vram total memory (b)")), number(card.get("unique id"))
    device_id = number(card.get("device id")) or number(card.get("gpu id"))
    return Gpu(
        index=index,
        name=name,
        memory_gib=memory / GIB if memory else None,
        architecture=words(card.get("gfx version")),
        device_id=device_id,
        uuid=uuid_of(serial) if serial else None,
        pci=lowered(card.get("pci bus")),
    )


def _lower(values: object) -> dict[str, object]:
    return {str(key).lower(): value for key, value in values.items()} if isinstance(values, dict) else {}
