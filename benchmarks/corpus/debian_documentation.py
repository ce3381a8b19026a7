"""Takes a billion characters of real text, in many languages, out of Debian's documentation packages.

python benchmarks/corpus/debian_documentation.py OUT [--packages FOLDER] [--only NAME ...] [--plain]

Needs Debian or a system derived from it (apt-get, dpkg-deb) and lxml: .venv/bin/pip install lxml.
"""

import argparse
import gzip
import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lxml import etree

LANGUAGES = """
ca cs da de dz el en-gb en-us es et eu fi fr gl hi hu id it ja km ko nl om pl pt pt-br ru sl sv tr vi zh-cn
zh-tw
"""
OTHER_PACKAGES = """
debian-handbook installation-guide-amd64 python3.11-doc postgresql-doc-15 cppreference-doc-en-html
qtbase5-doc-html erlang-doc racket-doc ghc-doc lazarus-doc-2.2 scala-doc wx3.2-doc libboost1.81-doc
python-pandas-doc python-scipy-doc python-sympy-doc python-django-doc libgtkmm-3.0-doc linux-doc-6.1
openjdk-17-doc rust-doc libstdc++-12-doc libfastutil-java-doc groovy-doc gnuradio-doc dcmtk-doc libpcl-doc
singular-doc casacore-doc vtk9-doc linux-source-6.1
"""
PACKAGES = [
    *(f"libreoffice-help-{language}" for language in LANGUAGES.split()),
    *(f"gimp-help-{language}" for language in ("en", "de", "fr", "es", "it", "ru", "ja", "ko")),
    *(f"lilypond-doc-html{language}" for language in ("", "-de", "-fr", "-es", "-it", "-ja", "-ca", "-nl")),
    *OTHER_PACKAGES.split(),
]
SHORTEST_DOCUMENT = 200
PART_BYTES = 100_000_000
FILES_PER_TASK = 100

# XML has none of these, and text has no use for them.
CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufdd0-\ufdd2\ufffe\uffff]")

SUFFIXES = {".html", ".htm", ".xhtml", ".txt", ".rst", ".md", ".c", ".h"}
# Indexes, searches and licences are lists, or the same in every package; _sources repeats Sphinx's pages.
LEFT_OUT_FILES = re.compile(
    r"(^|/)(_sources|class-use)/|(^|/)(genindex|search|changelog|copyright|license|index-\d+)[^/]*$", re.I
)

LEFT_OUT_TAGS = """
head script style nav aside footer form button select noscript svg template iframe object
"""
LEFT_OUT_ROLES = {"navigation", "search", "banner", "contentinfo"}
LEFT_OUT_CLASSES = """
anchor breadcrumb catlinks collapse-toggle contents editsection header-navigation headerlink hideme
line-numbers local menu-bar mlabels mobile-nav-chapters mw-indicators nav-panel nav-path nav-wrapper navfooter
navheader navigationbar navleft navpath navright navsetbottom navsettop noprint out-of-band permalink
printfooter related rst-footer-buttons side-nav sidebar skip-nav sphinxsidebar src-line-numbers srclink
sub-nav t-navbar tabs test-arrow toc tocset tooltip top-nav versionbox wy-nav-side
"""
BLOCKS = """
address article blockquote body br caption center dd details div dl dt fieldset figcaption figure h1 h2 h3 h4
h5 h6 header hr li main ol p pre section summary table tbody td tfoot th thead tr ul
"""
NAVIGATION = frozenset(LEFT_OUT_CLASSES.split())
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
# Unicode's noncharacters stand for the white space that has to survive, since all other white space is collapsed.
NEWLINE, SPACE, TAB = "\ufdd0", "\ufdd1", "\ufdd2"


def is_left_out(element: etree._Element) -> bool:
    """Whether an element is navigation or decoration rather than the document's text."""
    if element.tag == "header" and element.find(".//h1") is None:
        return True
    if element.get("role") in LEFT_OUT_ROLES or element.get("id") in NAVIGATION:
        return True
    return not NAVIGATION.isdisjoint((element.get("class") or "").split())


def keep_white_space(text: str) -> str:
    return text.expandtabs(8).strip("\n").replace("\n", NEWLINE).replace(" ", SPACE)


def put_around(element: etree._Element, before: str, after: str) -> None:
    element.text = before + (element.text or "")
    element.tail = after + (element.tail or "")


def text_of_page(page: bytes) -> str:
    """The text of an HTML page: a line for each block and table row, code as it stands, no navigation."""
    if not page.strip():
        return ""
    root = etree.fromstring(page, etree.HTMLParser(encoding="utf-8", remove_comments=True, huge_tree=True))
    if root is None:
        return ""
    for element in root.xpath("/*//*[@class or @role or @id or self::header]"):
        if is_left_out(element):
            element.tag = "script"
    etree.strip_elements(root, *LEFT_OUT_TAGS.split(), with_tail=False)
    for element in root.iter("pre"):
        text = NEWLINE + keep_white_space("".join(element.itertext())) + NEWLINE
        del element[:]
        element.text = text
    for element in root.iter("td", "th"):
        # A cell that is a single paragraph stays in its row's line.
        blocks = [block for block in element.iterdescendants(*BLOCKS.split()) if block.tag != "div"]
        if len(blocks) <= 1 and not any(block.tag in ("pre", "table", "ul", "ol") for block in blocks):
            text = "".join(element.itertext())
            del element[:]
            element.text = text
        if element.getnext() is not None:
            element.tail = TAB
    for element in root.iter(*BLOCKS.split()):
        if element.tag == "li" and not any(
            element.find(f".//{tag}") is not None for tag in ("section", *HEADINGS)
        ):
            put_around(element, NEWLINE + "-" + SPACE, NEWLINE)
        elif element.tag in HEADINGS:
            put_around(element, NEWLINE * 2, NEWLINE)
        elif element.tag not in ("td", "th"):
            put_around(element, NEWLINE, NEWLINE)
    text = " ".join("".join(root.itertext()).split())
    text = re.sub(f" +(?=[{NEWLINE}{TAB}])|(?<=[{NEWLINE}{TAB}]) +", "", text)
    text = text.replace(NEWLINE, "\n").replace(SPACE, " ").replace(TAB, "\t")
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"^-\n+(?:-\n+)*", "- ", text, flags=re.M)
    text = re.sub(r"\n\n(?=- )", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def decode(content: bytes) -> str:
    """UTF-8 if the bytes are, else what the page says that it is, else Latin-1, in which all bytes have a meaning."""
    declared = re.search(rb"charset=[\"']?([\w-]+)", content[:2000])
    for encoding in ("utf-8", declared.group(1).decode() if declared else "latin-1"):
        try:
            return content.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    return content.decode("latin-1")


def text_of_file(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
        path = path.with_suffix("")
    text = CONTROL.sub("", decode(content))
    if path.suffix in (".html", ".htm", ".xhtml"):
        try:
            return text_of_page(text.encode("utf-8", "replace"))
        except ValueError:  # an entity stands for a character that XML does not have
            return ""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def documents_of(task: tuple[Path, list[Path]]) -> list[dict[str, str]]:
    package, paths = task
    documents = []
    for path in paths:
        text = text_of_file(path)
        if len(text) >= SHORTEST_DOCUMENT:
            documents.append({"text": text, "source": f"{package.name}/{path.relative_to(package)}"})
    return documents


def stem(path: Path) -> tuple[str, str]:
    return path.parent.name, path.name.split(".")[0]


def text_files(package: Path) -> list[Path]:
    """The files of an unpacked package that hold text, without the .rst of a page that is there as .html too."""
    found = []
    for path in sorted(package.rglob("*")):
        plain = path.with_suffix("") if path.suffix == ".gz" else path
        is_skipped = LEFT_OUT_FILES.search(str(path.relative_to(package))) or path.is_symlink()
        if plain.suffix in SUFFIXES and path.is_file() and not is_skipped:
            found.append(path)
    pages = {stem(path) for path in found if path.suffix == ".html"}
    return [path for path in found if ".rst" not in path.suffixes or stem(path) not in pages]


def unpacked(folder: Path, name: str) -> Path:
    """The folder of a package, unpacked beside its .deb, which is downloaded where neither is there."""
    package = folder / name
    if not package.is_dir():
        if not list(folder.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["dpkg-deb", "-x", str(next(folder.glob(f"{name}_*.deb"))), str(package)], check=True)
        for archive in package.glob("usr/src/*.tar.xz"):
            subprocess.run(["tar", "-xJf", str(archive), "-C", str(archive.parent)], check=True)
            archive.unlink()
    return package


def tasks_of(folder: Path, names: list[str]) -> Iterator[tuple[Path, list[Path]]]:
    for name in names:
        try:
            package = unpacked(folder, name)
        except subprocess.CalledProcessError as error:
            print(f"\n{name}: left out, {error}", file=sys.stderr)
            continue
        paths = text_files(package)
        for start in range(0, len(paths), FILES_PER_TASK):
            yield package, paths[start : start + FILES_PER_TASK]


class Parts:
    """Files part-00, part-01, ... of about PART_BYTES, of JSON lines or of plain text."""

    def __init__(self, folder: Path, plain: bool) -> None:
        self.folder, self.plain = folder, plain
        self.number, self.bytes_left = -1, 0
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, document: dict[str, str]) -> int:
        line = document["text"] + "\n\n" if self.plain else json.dumps(document, ensure_ascii=False) + "\n"
        encoded = line.encode("utf-8", "replace")
        if self.bytes_left <= 0:
            self.number, self.bytes_left = self.number + 1, PART_BYTES
            name = f"part-{self.number:02d}.{'txt' if self.plain else 'jsonl'}"
            self.file = (self.folder / name).open("wb")
        self.file.write(encoded)
        self.bytes_left -= len(encoded)
        return len(document["text"].encode("utf-8", "replace"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--packages", type=Path, help="folder of .deb files or of unpacked packages (OUT/packages)"
    )
    parser.add_argument(
        "--only", nargs="+", default=PACKAGES, metavar="NAME", help="these packages instead of all"
    )
    parser.add_argument("--plain", action="store_true", help="write .txt, documents parted by an empty line")
    arguments = parser.parse_args()
    folder = arguments.packages or arguments.out / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    parts = Parts(arguments.out, arguments.plain)
    counters: list[Counter[str]] = [Counter() for _ in range(4)]
    documents, characters, encoded, duplicates = counters
    seen: set[bytes] = set()
    started = time.monotonic()
    with multiprocessing.Pool() as pool:
        for batch in pool.imap(documents_of, tasks_of(folder, arguments.only)):
            for document in batch:
                name = document["source"].split("/")[0]
                digest = hashlib.blake2b(document["text"].encode("utf-8", "replace"), digest_size=16).digest()
                if digest in seen:
                    duplicates[name] += 1
                    continue
                seen.add(digest)
                encoded[name] += parts.write(document)
                documents[name] += 1
                characters[name] += len(document["text"])
            message = (
                f"\r{characters.total() / 1e6:,.0f} million characters, {time.monotonic() - started:.0f} s"
            )
            print(message, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(
        "| package | documents | characters | UTF-8 bytes | exact duplicates left out |\n|---|---|---|---|---|"
    )
    for name in arguments.only:
        print(f"| {name} | " + " | ".join(f"{counter[name]:,}" for counter in counters) + " |")
    print("| all | " + " | ".join(f"{counter.total():,}" for counter in counters) + " |")


if __name__ == "__main__":
    main()
