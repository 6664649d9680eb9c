# The server on a CPU, for one machine:
#   docker build --tag qwen-all-in-one .
#   docker run --init --env QWEN_API_KEY=KEY --publish 127.0.0.1:8000:8000 \
#     --volume qwen-cache:/home/qwen/.cache qwen-all-in-one
# Every setting is an environment variable: --env QWEN_MODEL=mini. Without QWEN_API_KEY the server
# answers everybody who reaches the port.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# PyPI's torch for Linux brings gigabytes of CUDA libraries, this index's does not.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /app

# The largest layer first, so that a change of the server does not repeat it.
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url "${TORCH_INDEX}" --constraint constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY server server
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url "${TORCH_INDEX}" --constraint constraints.txt '.[ui]'

# Models, fitted judges and compiled kernels are kept in the user's cache.
RUN useradd --create-home --uid 1000 qwen \
    && install --directory --owner qwen --group qwen /home/qwen/.cache
USER 1000
WORKDIR /home/qwen
VOLUME /home/qwen/.cache

# All of the container's addresses; which of them others reach is decided by --publish.
ENV QWEN_HOST=0.0.0.0 \
    QWEN_PORT=8000
EXPOSE 8000

# The first start downloads a model. /health needs no key.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 CMD ["python", "-c", "\
import http.client, os; \
server = http.client.HTTPConnection('127.0.0.1', int(os.environ['QWEN_PORT']), timeout=4); \
server.request('GET', '/health'); \
raise SystemExit(server.getresponse().status != 200)"]

CMD ["qwen-all-in-one"]
