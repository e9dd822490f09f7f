"Guide 000 as a user with the hub runs it: an E5-shaped model and BEIR's archives, all served on this machine."
import base64
import hashlib
import http.server
import io
import json
import random
import threading
import zipfile

import pytest
import yaml
from sentence_transformers import SentenceTransformer

from conftest import ROOT
from embedlab.config import InputError, make_config

PRESET = yaml.safe_load((ROOT / "nbs/presets/ranksaga/e5.yaml").read_text())
WORDS = [a + b for a in "bold calm dark fast green loud odd pale quick warm".split() for b in "bird boat city door fish hill lamp road tree wave".split()]


def archive(name: str, splits: tuple[str, ...]) -> bytes:
    "A set in BEIR's layout, zipped: 60 documents with a title and a text, 20 queries a split that ask for one each."
    words = lambda i, n: " ".join(random.Random(f"{name} {i}").sample(WORDS, 9)[:n])
    files = {"corpus.jsonl": "".join(json.dumps({"_id": f"d{i}", "title": f"{name} title {words(i, 3)}", "text": words(i, 9), "metadata": {}}) + "\n" for i in range(60)),
             "queries.jsonl": "".join(json.dumps({"_id": f"q{i}", "text": f"asks {words(i, 5)}", "metadata": {}}) + "\n" for i in range(60))}
    for n, split in enumerate(splits):
        files[f"qrels/{split}.tsv"] = "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(20 * n, 20 * n + 20))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for path, text in files.items(): z.writestr(zipfile.ZipInfo(f"{name}/{path}"), text)
    return out.getvalue()


@pytest.fixture(scope="module")
def world(tiny_model):
    "A server with BEIR's archives, with intfloat/e5-base-v2 as the hub shows it, and with room for a model that is pushed."
    zips = {n: archive(n, s) for n, s in {"scifact": ("train", "test"), "nfcorpus": ("train", "dev", "test"), "scidocs": ("test",), "quora": ("dev", "test")}.items()}
    files = {str(p.relative_to(tiny_model)): p.read_bytes() for p in sorted(tiny_model.rglob("*")) if p.is_file()}
    commit = "0" * 40

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def send(self, body: bytes = b"", code: int = 200, **headers):
            self.send_response(code)
            for k, v in ({"Content-Length": str(len(body))} | headers).items(): self.send_header(k.replace("_", "-"), v)
            self.end_headers()
            if self.command != "HEAD": self.wfile.write(body)
        def say(self, x, code: int = 200): self.send(json.dumps(x).encode(), code, Content_Type="application/json")
        def do_HEAD(self): self.do_GET()
        def do_GET(self):
            path = self.path.partition("?")[0]
            if path.startswith("/beir/"): return self.zip(path[6:].removesuffix(".zip"))
            if path.startswith("/intfloat/e5-base-v2/resolve/"):
                body = files.get(path.split("/", 5)[5])
                return self.send(b"no such file", 404, X_Error_Code="EntryNotFound") if body is None else self.send(
                    body, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(body).hexdigest()}"', Accept_Ranges="bytes")
            if path.startswith("/api/models/intfloat/e5-base-v2/tree/"): return self.say([{"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for f, b in files.items()])
            if path.startswith("/api/models/intfloat/e5-base-v2"): return self.say({"id": "intfloat/e5-base-v2", "sha": commit, "siblings": [{"rfilename": f} for f in files], "tags": []})
            self.say({"error": "not found"}, 404)
        def zip(self, name):
            body = zips[name]; start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            if self.command == "GET": s.asked.append((name, start))
            if name == s.broken and not start:   # the line goes dead after 1,000 bytes, and stays dead
                self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body[:1000])
                self.close_connection = True; return
            if name == s.broken: return self.send_error(503)
            if name == s.changed: body = body[:-1] + b"x"
            self.send(body[start:], 206 if start else 200, **({"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}))
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != "Bearer hf_right": return self.say({"error": "Invalid username or password."}, 401)
            if self.path == "/api/repos/create":
                s.created.append(json.loads(body))
                return self.say({"url": f"http://{self.headers['Host']}/me/tuned", "name": "me/tuned"})
            if "/preupload/" in self.path: return self.say({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file": s.pushed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.say({"success": True, "commitOid": commit, "commitUrl": f"http://{self.headers['Host']}/me/tuned/commit/{commit}"})
            self.say({"valid": True})   # the card's front matter is looked over before a commit
        def log_message(self, *a): pass
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.asked, s.created, s.pushed, s.broken, s.changed = [], [], {}, None, None
    s.address, s.md5 = f"http://127.0.0.1:{s.server_address[1]}", {n: hashlib.md5(b).hexdigest() for n, b in zips.items()}
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()


@pytest.fixture
def guide(papermill, world, tmp_path):
    "Run the preset small; the kernel is told where the archives are and which checksums they have, and all else is as it is for a user."
    startup = tmp_path / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "beir.py").write_text(f"from embedlab import collections as _c\n_c.BEIR_URL = '{world.address}/beir/{{}}.zip'\n_c.BEIR.update({world.md5})\nfrom huggingface_hub import constants as _h\n_h.DOWNLOAD_CHUNK_SIZE = 100   # written after each; by itself after each 10 MB\n")
    env = {"JUPYTER_PATH": "", "IPYTHONDIR": str(tmp_path / "ipython"), "HF_ENDPOINT": world.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "EMBEDLAB_DATA": "", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    small = PRESET | {"batch_size": 16, "max_tokens": 32, "train_tokens": 32, "precision": "fp32", "checks": 1, "epochs": 1, "mine_from": 1, "mine_to": 20}
    def go(out="out", settings={}, **more): return papermill(out, env=env | more, **{k: v for k, v in (small | settings).items() if v is not None})
    go.folder = tmp_path
    return go


def shown(ran) -> str: # training rows on the page
    return str(next(c for c in ran.notebook().cells if c.cell_type == "code" and "training_sets" in c.source).outputs)


def test_e5_from_the_hub_with_four_archives(guide, world):
    "A download that breaks, one that is wrong, then the whole: prompts, titles, four sets, and a model that is pushed."
    world.broken = "nfcorpus"
    broken = guide("broken")
    assert broken.code and "nfcorpus is not here and could not be downloaded" in broken.text
    part, = (guide.folder / "cache").rglob("*.part")
    assert part.name == "nfcorpus.zip.part" and part.stat().st_size == 1000, "what had come is kept"
    world.broken, world.changed = None, "quora"
    wrong = guide("wrong")
    assert wrong.code and "MD5 is" in wrong.text and "quora" in wrong.text
    assert ("nfcorpus", 1000) in world.asked, "the download went on where it broke"
    assert not [*(guide.folder / "cache").rglob("*.part")]
    world.changed = None
    ran = guide("e5", {"run": "e5", "push_to_hub": "me/tuned"}, HF_TOKEN="hf_right")
    assert ran.code == 0, ran.text[-2000:]
    assert [n for n, _ in world.asked].count("scifact") == 1, "the second and third run take it from the cache"
    r = ran.record()
    assert {k.split("/")[0] for k in r.after} >= {"scifact", "nfcorpus", "scidocs", "quora"}
    assert (r.model["base"], r.model["prompts"]) == ("intfloat/e5-base-v2", {"query": "query: ", "document": "passage: ", "text": "query: "})
    assert "scifact title" in shown(ran), "titles stand in front of the texts"
    assert {world.created[0].get("private"), world.created[0].get("visibility")} & {True, "private"}, "a new repository is not shown to the world"
    card = world.pushed["README.md"].decode()
    assert all(x in card for x in ("base_model: intfloat/e5-base-v2", "## Intended use", "## Training data", "## Limits", "scifact/ndcg@10"))
    saved = guide.folder / "pushed"
    for name, body in world.pushed.items(): (saved / name).parent.mkdir(parents=True, exist_ok=True); (saved / name).write_bytes(body)
    ours = SentenceTransformer(str(guide.folder / "runs/e5/model"))
    assert SentenceTransformer(str(saved)).encode_query("fish").tolist() == ours.encode_query("fish").tolist() != ours.encode_document("fish").tolist()
    assert ours.prompts["document"] == "passage: "


def test_without_prompts_and_titles_none_is_used_anywhere(guide):
    ran = guide("plain", {"run": "plain-e5-base", "prompts": False, "titles": False, "train": "scifact,nfcorpus"})
    assert ran.code == 0, ran.text[-2000:]
    assert " title " not in shown(ran), "titles are left out where the settings say so"
    assert {*ran.record().model["prompts"].values()} == {""}
    saved = SentenceTransformer(str(guide.folder / "runs/plain-e5-base/model"))
    assert saved.encode_query("fish").tolist() == saved.encode_document("fish").tolist()


def test_a_push_that_may_not_be_is_refused_before_training(guide, world):
    ran = guide("refused", {"push_to_hub": "me/tuned"}, HF_TOKEN="hf_wrong")
    assert ran.code and "push_to_hub: me/tuned could not be made" in ran.text and "hf auth login" in ran.text
    assert ran.record().status == "failed" and not [*(guide.folder / "runs").rglob("model")]
    with pytest.raises(InputError, match="push_to_hub must be OWNER/NAME"): make_config(push_to_hub="tuned")
