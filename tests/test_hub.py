"""support/hub.py: weights by name, from a server that speaks Hugging Face's protocol; what it refuses."""
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save_file

from support import hub, identity, metrics, runs, text, weights
from support.hub import wanted

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- the server


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories {"org/name": {file: bytes}} on a server; `asked` lists the files fetched from them."""

    def __init__(self, repositories, gated=(), tokens=()):
        self.repositories = repositories
        self.gated = gated
        self.tokens = tokens
        self.asked = []
        self.commit = COMMIT

    def answer(self, method, path, token):
        """(status, headers, body) of a request."""
        words = [unquote(word) for word in urlsplit(path).path.strip("/").split("/")]
        if token and token not in self.tokens:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        api = words[:2] == ["api", "models"]
        repo = "/".join(words[2:4] if api else words[:2])
        rest = words[4:] if api else words[2:]
        if repo not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""              # as the real hub, without a token
        if len(rest) > 1 and rest[1] not in ("main", self.commit):         # after revision, tree or resolve
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.repositories[repo]
        if api and rest[:1] == ["tree"]:
            return 200, {}, json.dumps([described(name, files[name]) for name in files]).encode()
        if api:
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            about = {"id": repo, "sha": self.commit, "siblings": siblings, "tags": [], "private": False}
            return 200, {}, json.dumps(about).encode()
        name = "/".join(rest[2:])
        if repo in self.gated and token not in self.tokens:
            return (403 if token else 401), {"X-Error-Code": "GatedRepo"}, b""
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if method == "GET":
            self.asked.append(name)
        etag = hashlib.sha1(files[name]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit}, files[name]


def described(name, content):
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serve(hub):
    """Serve the hub; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self):
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, headers, body = hub.answer(self.command, self.path, token)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body)), "Connection": "close"}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = reply
        do_HEAD = reply

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def files_of(folder):
    """{name: bytes} of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def connect(tmp_path, monkeypatch):
    """connect(address) -> huggingface_hub asks there, with a new cache and no token, in an empty folder."""
    from huggingface_hub import constants
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.fetch.cache_clear()
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_TOKEN_PATH", str(tmp_path / "no-token")),
                        ("HF_HUB_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setattr(constants, name, value)

    def to(address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return to


@pytest.fixture
def online(connect):
    """online(repositories, **options) -> the Hub that is used from now on; hub.stop() ends it."""
    running = []

    def start(repositories, **options):
        repositories = {name: files_of(files) if isinstance(files, Path) else files
                        for name, files in repositories.items()}
        fake = Hub(repositories, **options)
        server = serve(fake)
        connect(server.__enter__())
        running.append(server)
        fake.stop = lambda: running.pop().__exit__(None, None, None)
        return fake
    yield start
    for server in running:
        server.__exit__(None, None, None)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- the loaders


def test_each_loader_fetches_only_what_it_reads_of_a_pipeline(online, sd3_folder):
    pipeline = files_of(sd3_folder) | {
        "sd3.safetensors": b"everything once more", "README.md": b"read me",
        "vae/diffusion_pytorch_model.fp16.safetensors": b"half",
        "text_encoder/model.fp16.safetensors": b"half",
        "text_encoders/clip_l.safetensors": b"once more, for ComfyUI", "text_encoders/README.md": b"read me",
        "text_encoders/t5xxl_fp16.safetensors": b"once more, for ComfyUI"}
    fake = online({"org/sd3": pipeline})
    assert same(weights.load_base_vae("org/sd3"), weights.load_base_vae(sd3_folder))
    assert sorted(fake.asked) == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert same(weights.load_dit("org/sd3"), weights.load_dit(sd3_folder))
    assert {name.split("/")[0] for name in fake.asked} == {"vae", "transformer"}
    there = hub.local("org/sd3", "text")
    assert text.fingerprint(there) == text.fingerprint(sd3_folder)
    assert not [name for name in fake.asked if name.startswith("text_encoders/")]
    fetched = {name for name in fake.asked if "fp16" in name or "/" not in name}
    assert fetched == {"model_index.json"}                         # it names the pipeline


def test_prompts_are_encoded_by_encoders_given_by_name(online, sd3_folder, tmp_path):
    online({"org/sd3": sd3_folder})
    cpu = torch.device("cpu")
    for name, out in (("org/sd3", "named"), (sd3_folder, "local")):
        text.cache_text(name, ["a fox"], tmp_path / out, cpu, t5_tokens=8)
    named, here = (text.text_for(tmp_path / out, [], "", cpu, 8)(["a fox"]) for out in ("named", "local"))
    assert all(torch.equal(x, y) for x, y in zip(named, here))


@pytest.mark.parametrize("load", [weights.load_davae, weights.load_measured, weights.load_base_vae])
def test_an_uploaded_run_is_read_at_its_newest_step(online, make_davae, tmp_path, load):
    for step in (9, 10):
        vae = make_davae()
        vae.mean.fill_(step)
        runs.save_checkpoint(tmp_path / "run", step, {"model": vae.state_dict()}, {}, {"model": vae.config()})
    fake = online({"me/my-vae": tmp_path / "run"})
    assert same(load("me/my-vae"), load(tmp_path / "run"))
    assert {name.split("/")[0] for name in fake.asked} == {"step_000010"}
    assert identity.of_source("me/my-vae", "vae") == identity.of_source(tmp_path / "run", "vae")


def test_an_uploaded_transformer_comes_with_its_ema_but_without_its_optimizer(online, make_dit, tmp_path):
    parts = {"model": make_dit(seed=1).state_dict(), "ema": make_dit(seed=2).state_dict()}
    about = {"model": {"kind": "LightningDiT"} | dataclasses.asdict(make_dit().cfg)}
    runs.save_checkpoint(tmp_path / "run", 3, parts, {"opt": 0}, about)
    fake = online({"me/my-dit": tmp_path / "run"})
    assert same(weights.load_dit("me/my-dit"), make_dit(seed=2))
    assert same(weights.load_dit("me/my-dit", "model"), make_dit(seed=1))
    assert sorted(Path(name).name for name in fake.asked) == [
        "SHA256SUMS", "config.json", "ema.safetensors", "model.safetensors"]


def test_a_single_file_comes_with_its_config_and_statistics(online, make_base, tmp_path):
    from support.formats import export_kl
    base = make_base()
    stats = {"mean": torch.full((1, 4, 1, 1), 0.5), "std": torch.full((1, 4, 1, 1), 2.0)}
    folder = tmp_path / "vavae"
    folder.mkdir()
    save_file(export_kl(base), folder / "vavae.safetensors")
    torch.save(stats, folder / "latents_stats.pt")
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL", "norm_num_groups": 4}')
    (folder / "other.pt").write_bytes(b"another model")
    fake = online({"org/vavae": folder})
    assert weights.load_base_vae("org/vavae/vavae.safetensors").mean.tolist() == [0.5] * 4
    assert sorted(fake.asked) == ["config.json", "latents_stats.pt", "vavae.safetensors"]
    with pytest.raises(SystemExit, match="org/vavae: holds 2 weight files .*name the one you mean"):
        weights.load_base_vae("org/vavae")


def test_the_lpips_trunk_may_be_a_file_on_the_hub(online, tmp_path):
    metrics.import_torchvision()
    import lpips
    net = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).net
    trunk = {}
    for part in net.children():
        trunk |= {f"features.{key}": weight.clone() for key, weight in part.state_dict().items()}
    save_file(trunk, tmp_path / "trunk.safetensors")
    online({"org/trunks": {"squeeze.safetensors": (tmp_path / "trunk.safetensors").read_bytes()}})
    named = metrics.make_lpips("squeeze", "org/trunks/squeeze.safetensors")
    assert same(named, metrics.make_lpips("squeeze", tmp_path / "trunk.safetensors"))


def test_clip_is_fetched_with_its_tokenizer_and_without_other_formats():
    names = ["README.md", "config.json", "merges.txt", "model.safetensors", "pytorch_model.bin",
             "tf_model.h5", "preprocessor_config.json", "tokenizer.json", "vocab.json",
             "onnx/model.safetensors"]
    fetch, path = wanted(names, part="clip")
    assert set(fetch) == {"config.json", "merges.txt", "model.safetensors", "preprocessor_config.json",
                          "tokenizer.json", "vocab.json"}
    assert path == ""


# ---------------------------------------------------------------- which files


SHARDS = ["t/m.safetensors.index.json", "t/m-00001-of-00002.safetensors", "t/m-00002-of-00002.safetensors"]
HALF = ["t/m.safetensors.index.fp16.json", "t/m.fp16-00001-of-00002.safetensors",
        "t/m.fp16-00002-of-00002.safetensors"]


@pytest.mark.parametrize("names, inside, part, fetched", [
    (["t/config.json", *SHARDS, *HALF], "", "t", ["t/config.json", *SHARDS]),
    (HALF, "", "t", HALF),
    ([*SHARDS, *HALF], "t", "", SHARDS),
    ([*SHARDS, *HALF], SHARDS[1], "", SHARDS),
    (["taef2_decoder.pth", "taef2_encoder.pth", "taesd_encoder.pth"], "", "vae",
     ["taef2_decoder.pth", "taef2_encoder.pth"]),
    (["a.pt", "a.safetensors", "a.ema.safetensors", "optimizer.pt"], "", "vae", ["a.ema.safetensors"]),
    (["deep/down/vae/a.pt", "deep/down/b.pt"], "deep/down", "vae", ["deep/down/vae/a.pt"]),
    (["step_90/model.safetensors", "step_100/model.safetensors", "step_100/SHA256SUMS", "step_by_step.md",
      "frozen/model.safetensors", "step_100/train_state.pt"], "", "transformer",
     ["step_100/SHA256SUMS", "step_100/model.safetensors", "frozen/model.safetensors"]),
])
def test_a_load_fetches_one_whole_variant_from_a_folder(names, inside, part, fetched):
    assert sorted(wanted(names, inside, part)[0]) == sorted(fetched)


def test_a_missing_file_is_reported_with_what_the_repository_has():
    with pytest.raises(ValueError, match="there is no b.pt in it; name one of a.pt, c/d.pt"):
        wanted(["c/d.pt", "a.pt"], "b.pt")
    with pytest.raises(ValueError, match="no weights in it, but README.md; its folders are c"):
        wanted(["README.md", "c/d.pt"])
    with pytest.raises(ValueError, match="there is no text_encoder"):
        wanted(["vae/a.safetensors"], part="text")


@pytest.mark.parametrize("source", [
    "out/tiny", "weights/model.pt", "/abs/olute", "./here/it", "../up/it", "taef2", "here/missing",
    "here/it/is", "https://huggingface.co/org/name", "~/a/b", ""])
def test_a_path_is_not_a_hub_name(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not hub.is_name(source) and hub.local(source) == source
    assert not hub.is_name({"a": 1}) and not hub.is_name(None)


def test_local_files_are_never_requested(online, make_base, tmp_path):
    fake = online({"org/name": {"model.safetensors": b""}})
    weights.save_base_vae(make_base(), tmp_path / "org" / "name")
    assert same(weights.load_base_vae("org/name"), make_base())
    assert fake.asked == []


# ---------------------------------------------------------------- the cache


def test_a_second_load_uses_the_cache_even_with_the_server_down(online, sd3_folder, capsys):
    fake = online({"org/sd3": sd3_folder})
    first = weights.load_base_vae("org/sd3")
    asked = list(fake.asked)
    hub.fetch.cache_clear()                                        # as in another process
    weights.load_base_vae("org/sd3")
    assert fake.asked == asked                                     # nothing is fetched twice
    fake.stop()
    hub.fetch.cache_clear()
    capsys.readouterr()
    assert same(weights.load_base_vae("org/sd3"), first)
    assert "org/sd3: taken from the cache" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no weights in it|there is no"):
        weights.load_dit("org/sd3")                                # the cache has none of it
    with pytest.raises(SystemExit, match=r"no such file or folder here; on the hub, .*cannot be fetched \("):
        weights.load_dit("org/other")


def test_weights_are_identified_by_their_contents_wherever_the_cache_is(
        online, sd3_folder, tmp_path, monkeypatch):
    from huggingface_hub import constants
    online({"org/sd3": sd3_folder})
    here = identity.of_source("org/sd3", "vae")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    hub.fetch.cache_clear()
    assert here == identity.of_source("org/sd3", "vae") == identity.of_source(sd3_folder, "vae")
    assert here != identity.of_source("org/sd3", "transformer")
    assert identity.of_source("org/nothing", "vae") is None


def test_a_commit_can_be_named(online, sd3_folder):
    online({"org/sd3": sd3_folder})
    assert hub.local(f"org/sd3@{COMMIT}", "vae").name == COMMIT
    assert hub.local("org/sd3@main/vae/config.json").name == "config.json"


def test_a_named_commit_is_read_online_and_from_the_cache_after_main_has_moved_on(online):
    fake = online({"org/a": {"a.pt": b"new"}})
    former = Hub({"org/a": {"a.pt": b"old"}})
    former.commit = "f" * 40
    answer = fake.answer
    fake.answer = lambda method, path, token: (former.answer if former.commit in path else answer)(
        method, path, token)
    for _ in ("online", "from the cache"):
        for source, content in (("org/a/a.pt", b"new"), (f"org/a@{former.commit}/a.pt", b"old")):
            assert hub.local(source).read_bytes() == content
        fake.answer = lambda method, path, token: (503, {}, b"")
        hub.fetch.cache_clear()


@pytest.mark.slow
def test_the_hubs_own_environment_variables_are_honoured(sd3_folder, tmp_path):
    program = "from support import hub; print(hub.local('org/sd3', 'vae'))"

    def run(**variables):
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | variables
        return subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, cwd=tmp_path,
                              env=env | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")})
    with serve(Hub({"org/sd3": files_of(sd3_folder)}, gated=["org/sd3"], tokens=["good"])) as address:
        refused = run(HF_ENDPOINT=address)
        assert "it is gated (401)" in refused.stderr and refused.returncode == 1
        found = run(HF_ENDPOINT=address, HF_TOKEN="good")
        assert f"/home/hub/models--org--sd3/snapshots/{COMMIT}" in found.stdout, found.stderr
    offline = run(HF_HUB_OFFLINE="1")
    assert f"snapshots/{COMMIT}" in offline.stdout and "HF_HUB_OFFLINE forbids" in offline.stderr


# ---------------------------------------------------------------- what fails


@pytest.mark.parametrize("source, token, sentence", [
    ("org/nothing", "", "there is no org/nothing, or you may not see it: check the name"),
    ("org/gated", "", r"it is gated \(401\): agree to its terms on http://127.*/org/gated, then run"),
    ("org/gated", "good-for-nothing", r"your token is refused \(401\): run  hf auth login  with one"),
    ("org/open@v9", "", "it has no branch, tag or commit 'v9'"),
    ("org/open/b.safetensors", "", "org/open/b.safetensors: there is no b.safetensors in it; name one"),
    ("org/bro--ken", "", "there is no org/bro--ken"),
])
def test_a_refusal_by_the_hub_becomes_one_sentence_with_advice(online, monkeypatch, source, token, sentence):
    online({"org/open": {"a.safetensors": b""}, "org/gated": {"a.safetensors": b""}}, gated=["org/gated"],
           tokens=["good"])
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match=sentence) as refused:
        runs.read_state_dict(source)
    assert str(refused.value).startswith(source) and "\n" not in str(refused.value)


def test_a_token_without_access_to_a_gated_model_must_agree_to_its_terms(online, monkeypatch):
    fake = online({"org/gated": {"a.safetensors": b""}}, gated=["org/gated"], tokens=["good"])
    monkeypatch.setenv("HF_TOKEN", "known")
    answer = fake.answer

    def knows(method, path, token):
        return (403, {"X-Error-Code": "GatedRepo"}, b"") if "resolve" in path else answer(method, path, "")
    fake.answer = knows
    with pytest.raises(SystemExit, match=r"it is gated \(403\): agree to its terms"):
        weights.load_base_vae("org/gated")


def test_without_network_or_package_the_error_says_what_would_help(connect, monkeypatch):
    connect("http://127.0.0.1:9")                                  # nothing listens there
    with pytest.raises(SystemExit, match=r"cannot be fetched \(.*refused\): try again, or give a local path"):
        weights.load_dit("org/name")
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="HF_HUB_OFFLINE forbids asking: fetch it once without that"):
        weights.load_dit("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match="org/name: no such file or folder .*pip install huggingface_hub"):
        weights.load_base_vae("org/name")
