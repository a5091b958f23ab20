"""Arguments and options of the commands: names, values and help texts."""

from typing import Annotated

import typer

from specchat.chat.settings import OVERFLOWS
from specchat.cli import bench_options, completion, options
from specchat.records.model import QUANTS

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=completion.models,
        help="demo, a folder or GGUF file (./x, ~/x), a hub id (org/name, org/name:Q4_K_M) or shape:NAME.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        autocompletion=completion.drafts,
        help="Draft: a MODEL, mtp, self, retrieval, MODEL+retrieval, auto or none. [default: auto]",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="For GGUF: a folder or hub id whose tokenizer to use. [default: the file's own]",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        autocompletion=completion.words("auto", "cpu", "cuda"),
        help="Compute device: auto, cpu, cuda or cuda:N. [default: auto]",
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        autocompletion=completion.words("auto"),
        help="Devices that share the layers, as in cuda:0,cuda:1=6GiB,cpu; auto for all GPUs. [default: one device]",
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Other machines that compute layers, as in 10.0.0.2:7000,10.0.0.3:7000. [default: none]",
    ),
]
TokenFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Token that all machines know. [default: the variable SPECCHAT_TOKEN]"),
]
Listen = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS:PORT", help="Address to listen on; port 0 takes a free one. [default: none]"),
]
WorkerModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=completion.models,
        help="Files of the model on this machine. [default: the same name as there]",
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Device memory to use, for example 8GiB; RAM on the CPU. [default: free memory minus a reserve]",
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Host memory for streamed layers; the rest is read from disk. [default: free memory minus a reserve]",
    ),
]
Ctx = Annotated[
    str | None,
    typer.Option(
        metavar="N", help="Context length in tokens, answers included. [default: 8192, or less if memory is short]"
    ),
]
TreeBudget = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        autocompletion=completion.words("auto"),
        help="Most draft tokens that one pass checks, or auto. [default: auto]",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        autocompletion=completion.words(*options.DTYPES),
        help="Precision of the computation: auto, bf16, fp16 or fp32. [default: auto]",
    ),
]
Quant = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        autocompletion=completion.words("auto", *QUANTS),
        help="Quantize the model: auto, none, int8, int4, int3. [default: auto]",
    ),
]
DraftQuant = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        autocompletion=completion.words("auto", *QUANTS),
        help="Quantize the draft; the text stays the same. [default: auto]",
    ),
]
Config = Annotated[
    str | None, typer.Option(metavar="FILE", help="Read settings from FILE. [default: ~/.config/specchat/config.toml]")
]
Offline = Annotated[bool | None, typer.Option("--offline", help="Never use the network.")]
Yes = Annotated[bool, typer.Option("--yes", help="Download without asking.")]
Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", help="Answer PROMPT and exit; without PROMPT, chat.")]
Temperature = Annotated[
    str | None,
    typer.Option(metavar="T", help="Sampling temperature; 0 is greedy. [default: the model's, else 0]"),
]
TopP = Annotated[
    str | None,
    typer.Option(
        metavar="P",
        help="Sample from the likeliest tokens with total probability P. [default: the model's, else 1]",
    ),
]
TopK = Annotated[
    str | None,
    typer.Option(metavar="K", help="Sample from the K likeliest tokens; 0 keeps all. [default: the model's, else 0]"),
]
MinP = Annotated[
    str | None,
    typer.Option(
        metavar="P",
        help="Drop tokens less likely than P times the likeliest one. [default: the model's, else 0]",
    ),
]
RepetitionPenalty = Annotated[
    str | None,
    typer.Option(metavar="R", help="Values above 1 make repetition less likely. [default: the model's, else 1]"),
]
Seed = Annotated[
    str | None, typer.Option(metavar="N", help="Seed of the sampling, to repeat an answer. [default: random]")
]
MaxTokens = Annotated[
    str | None, typer.Option(metavar="N", help="Longest answer in tokens. [default: what the context allows]")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End the answer before TEXT; may be repeated. [default: none]"),
]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT|@FILE", help="System prompt, or @FILE to read it from FILE. [default: none]"),
]
File = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH", help="Send a text file with the first message; may be repeated. [default: none]"),
]
Think = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think",
        help="Turn thinking on or off, if the chat template can. [default: as the template sets it]",
    ),
]
Overflow = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        autocompletion=completion.words(*OVERFLOWS),
        help="When the context is full: stop or drop-oldest. [default: stop]",
    ),
]
Base = Annotated[bool, typer.Option("--base", help="Continue the prompt without a chat template, for base models.")]
Continue = Annotated[bool, typer.Option("--continue", "-c", help="Resume the last saved chat.")]
Session = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        autocompletion=completion.sessions,
        help="Resume the chat with this name, or start one. [default: a new name]",
    ),
]
Save = Annotated[bool | None, typer.Option("--save/--no-save", help="Save the chat, or do not. [default: save]")]
Raw = Annotated[
    bool | None, typer.Option("--raw/--no-raw", help="Show answers without Markdown layout. [default: with it]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the answer.")]
JsonStream = Annotated[
    bool, typer.Option("--json-stream", help="Print one JSON object per line while the answer is written.")
]
PromptsFile = Annotated[
    str | None,
    typer.Option("--prompts", metavar="FILE", help="Answer the prompts of a file of JSON lines. [default: none]"),
]
Results = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="File of the results of --prompts, continued if it exists. [default: none]",
    ),
]
Batch = Annotated[
    str | None,
    typer.Option(metavar="N", help="Answers of --prompts that share a pass, or auto. [default: auto]"),
]
Plan = Annotated[bool, typer.Option("--plan", help="Print the plan and its predicted speed; load nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the answer and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print one line for each pass, on stderr.")]
Prompts = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Questions as JSON lines, as in MT-Bench. [default: built-in questions]"),
]
Limit = Annotated[
    str | None,
    typer.Option(metavar="N", help="Ask N questions. [default: as many as two minutes allow]"),
]
Repeats = Annotated[str | None, typer.Option("--repeats", "-r", metavar="N", help="Measure N times. [default: 3]")]
BenchMaxTokens = Annotated[str | None, typer.Option(metavar="N", help="Longest answer in tokens. [default: 64]")]
BenchSeed = Annotated[str | None, typer.Option(metavar="N", help="Seed of the sampling. [default: 0]")]
Baseline = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        autocompletion=completion.lists(*bench_options.BASELINES, "none"),
        help="Compare with plain, layers, accelerate, assisted, llama.cpp. [default: plain]",
    ),
]
LimitMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Limit memory and page cache of each system. [default: no limit]"),
]
Cold = Annotated[bool, typer.Option("--cold", help="Drop the model's files from the page cache before every pass.")]
Passes = Annotated[bool, typer.Option("--passes", help="Also time single passes, and raw reads of the model's files.")]
Sweep = Annotated[
    str | None,
    typer.Option(
        metavar="OPTION=A,B,C",
        autocompletion=completion.words(*(f"{name}=" for name in bench_options.SWEEPS)),
        help="Measure each value of tree-budget, vram, ctx, draft, quant, slots or memory. [default: none]",
    ),
]
Batches = Annotated[
    str | None,
    typer.Option("--batch", metavar="A,B,C", help="Measure A, B and C answers that share a pass. [default: none]"),
]
Plot = Annotated[
    str | None, typer.Option(metavar="FILE", help="Draw the sweep into an .svg or .png file. [default: none]")
]
Compare = Annotated[
    tuple[str, str] | None,
    typer.Option(metavar="A.json B.json", help="Compare two reports; measure nothing. [default: none]"),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FORM",
        autocompletion=completion.words(*bench_options.FORMATS),
        help="Report format: table, md, json, jsonl or csv. [default: table]",
    ),
]
BenchJson = Annotated[bool, typer.Option("--json", help="Print JSON; short for -o json.")]
BenchQuiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the report and errors.")]
ProbeJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a bug report.")]
Refresh = Annotated[bool, typer.Option("--refresh", help="Measure again instead of using saved rates.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Check every pack against its checksums; exit 3 if one is damaged.")
]
ProbeQuiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the report and errors.")]
ModelsAction = Annotated[
    str | None,
    typer.Argument(metavar="ACTION", autocompletion=completion.words("list", "rm"), help="list or rm. [default: list]"),
]
InstalledNames = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME", autocompletion=completion.installed, help="For rm: a model or a pack's folder."),
]
SessionsAction = Annotated[
    str | None,
    typer.Argument(
        metavar="ACTION",
        autocompletion=completion.words("list", "search", "show", "rm"),
        help="list, search, show or rm. [default: list]",
    ),
]
SessionWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ID|TEXT", autocompletion=completion.sessions, help="For show and rm: chats. For search: a text."
    ),
]
YesRemove = Annotated[bool, typer.Option("--yes", help="Remove without asking.")]
Host = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is all networks. [default: 127.0.0.1]"),
]
Port = Annotated[str | None, typer.Option(metavar="N", help="Port to listen on; 0 takes a free one. [default: 8000]")]
ApiKey = Annotated[
    str | None, typer.Option(metavar="KEY", help="Key that every request must have. [default: none is needed]")
]
Parallel = Annotated[
    str | None,
    typer.Option(metavar="N", help="Answers at once, each with memory for a context; others wait. [default: 1]"),
]
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ORIGIN", help="Let web pages of ORIGIN (or *) use the server; may be repeated. [default: none]"
    ),
]
ServeQuiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")]
