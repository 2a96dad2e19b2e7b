"""Folders with a few pages of English and of code."""

import gzip


def write_texts(folder):
    words = "the cache holds keys and values of many tokens; a page is merged. "
    for i in range(40):
        (folder / "english").mkdir(exist_ok=True)
        (folder / "code" / "part").mkdir(parents=True, exist_ok=True)
        (folder / "english" / f"{i}.rst").write_text(f"Page {i}\n" + words * (10 + i))
        (folder / "code" / "part" / f"m{i}.py").write_text(f"x = {i}\n" + "y = [x, 2]\n" * (50 + i))
    (folder / "english" / "packed.txt.gz").write_bytes(gzip.compress(b"Packed. " * 100))
    (folder / "english" / "copy.rst").write_bytes((folder / "english" / "3.rst").read_bytes())
    (folder / "english" / "other.rst").write_text("это не английский текст " * 60)
    (folder / "english" / "picture.png").write_bytes(b"\x89PNG" * 200)
    return folder / "english", folder / "code"
