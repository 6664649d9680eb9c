"""Records vLLM's answers to all requests that the scenario causes.

    cp -r server/models/qwen-mini /tmp/qwen-mini  # vLLM cannot read its 8-bit rows
    python -m training.export --weights server/models/qwen-mini --out /tmp/qwen-mini --dtype float32
    VLLM_CPU_KVCACHE_SPACE=2 benchmarks/cache/vllm/bin/vllm serve /tmp/qwen-mini \\
        --served-model-name qwen-mini --dtype float32 --enforce-eager \\
        --enable-prompt-tokens-details --port 8100
    python -m tests.remote.record http://127.0.0.1:8100
"""

import argparse
import json
from dataclasses import asdict

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.config import Settings
from tests.remote.scenario import SCENARIO
from tests.remote.standin import FILE, Exchange
from tests.servers import run_app, run_live


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of a vLLM that serves qwen-mini in float32")
    url = parser.parse_args().url
    exchanges: dict[str, Exchange] = {}

    async def forward(request: Request) -> Response:
        body = await request.body()
        async with httpx.AsyncClient(timeout=600) as client:
            answer = await client.request(
                request.method, url + request.url.path, content=body,
                headers={"content-type": "application/json"},
            )  # fmt: skip
        media_type = answer.headers.get("content-type", "")
        exchange = Exchange(
            request.method, request.url.path, json.loads(body or "null"), answer.status_code,
            media_type, answer.text,
        )  # fmt: skip
        if request.url.path != "/health":
            exchanges[exchange.key] = exchange
        return Response(answer.content, answer.status_code, media_type=media_type)

    proxy = Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])])
    with (
        run_app(proxy) as proxy_url,
        run_live(Settings(model="mini", engine=proxy_url, ui=False)) as front,
    ):
        for name, (path, body) in SCENARIO.items():
            answer = httpx.post(front.url + path, json=body, timeout=600)
            print(name, answer.status_code, answer.text[:300])
    lines = [json.dumps(asdict(each), ensure_ascii=False) for each in exchanges.values()]
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} exchanges in {FILE}")


if __name__ == "__main__":
    main()
