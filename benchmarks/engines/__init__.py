"""The measured engines, ours and its peers, each in its own process.

`python -m benchmarks.engines NAME MODEL` reads one case per line from stdin, as JSON, and answers
each with a JSON line; `benchmarks.worker` is its client. MODEL is a folder or file in the engine's
own format (`benchmarks.exports`).

    {"case": "prefill", "num_tokens": 128}                      -> {"seconds": ...}
    {"case": "decode", "num_streams": 8, "num_cached": 100}     -> {"seconds": ...} for a step
      the same with "sampling": true                            -> with Qwen's sampling defaults
    {"case": "perplexity", "texts": [[...]], "vocab_size": ...} -> {"perplexity": ...}
    {"case": "memory"}                                          -> {"peak_mib": ...} until now
    {"case": "generate", "num_streams": 8, "num_cached": 40, "num_new": 64}
                                                                -> {"seconds": ...}, ours only
    {"case": "classify", "num_texts": 64, "num_tokens": 30}     -> {"seconds": ...}, BERT only

OpenVINO runs in another environment, without this project's packages. So this file, `__main__`,
`measuring` and `openvino` import only the standard library, numpy and OpenVINO.
"""

BERT = "bert-base"
# llama.cpp with flash attention, its own choice, and without: the better one counts.
TOKEN_ENGINES = [
    "ours-float32", "ours-bfloat16", "ours-int8", "ours-int4",
    "transformers-float32", "transformers-bfloat16",
    "llama.cpp-q8_0", "llama.cpp-q8_0-noflash", "llama.cpp-q4_0", "llama.cpp-q4_0-noflash",
    "llama.cpp-bf16",
    "openvino-int8", "openvino-int4",
]  # fmt: skip
