"""Explains a label: the label of each sentence, and the weight of each word.

python -m openai_examples.explain
"""

from typing import Any

from openai_examples.connection import clear_errors, connect

REVIEW = "屏幕太好看了，我很喜欢！客服态度太差了，气死我了。"


def main() -> None:
    """Prints the sentences, then the three words with the largest weights."""
    with clear_errors():
        client = connect()
        body = {"input": REVIEW, "sentences": True, "explain": True}
        # The openai client's generic `post` calls any route.
        [item] = client.post("/classify", body=body, cast_to=dict[str, Any])["data"]
        print(f"{item['label']}{', mixed' if item['mixed'] else ''}")
        for each in item["sentences"]:
            start = each["offset"]
            print(f"{each['label']:8}  {REVIEW[start : start + each['length']]}")
        words = sorted(item["words"], key=lambda word: -abs(word["weight"]))
        print(", ".join(f"{word['text']} {word['weight']:+.2f}" for word in words[:3]))


if __name__ == "__main__":
    main()
