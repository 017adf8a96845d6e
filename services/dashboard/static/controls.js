// Scale, pause and stop, behind the token.

const SETTLE_MS = 500; // several presses in a row are one request

const by = (id) => document.getElementById(id);

/** The token of this browser tab. */
export const token = {
  get: () => sessionStorage.getItem("token"),
  headers: () => (token.get() ? { Authorization: `Bearer ${token.get()}` } : {}),
  set: (value) => sessionStorage.setItem("token", value),
  clear: () => sessionStorage.removeItem("token"),
};

async function call(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...options.headers, ...token.headers() } });
  const body = answer.headers.get("content-type")?.includes("json") ? await answer.json() : {};
  return { ok: answer.ok, status: answer.status, body };
}

export class Controls {
  /** @param {() => void} onUnlocked a token was accepted */
  constructor(onUnlocked) {
    this.onUnlocked = onUnlocked;
    this.isUnlocked = false;
    this.wanted = null;
    this.status = null;
    by("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      token.set(by("token").value.trim());
      this.check({ isTyped: true });
    });
    by("fewer").addEventListener("click", () => this.change(-1));
    by("more").addEventListener("click", () => this.change(1));
    by("pause").addEventListener("click", () => this.send(this.status.state === "paused" ? { action: "continue" } : { action: "pause" }));
    by("stop").addEventListener("click", () => by("stop-dialog").showModal());
    by("stop-dialog").addEventListener("close", () => {
      if (by("stop-dialog").returnValue === "stop") this.send({ action: "stop" });
      by("stop-dialog").returnValue = "";
    });
  }

  /** Asks the dashboard whether it takes our token. */
  async check({ isTyped = false } = {}) {
    this.isUnlocked = false;
    if (token.get()) {
      const { ok, status, body } = await call("api/token");
      this.isUnlocked = ok;
      if (status === 401) {
        token.clear();
        this.say(body.detail, "bad");
      } else if (ok) {
        this.say("");
        this.onUnlocked();
      }
    }
    this.show();
    if (isTyped && this.isUnlocked) by("more").focus();
    if (isTyped && !this.isUnlocked) by("token").select();
  }

  update(status) {
    this.status = status;
    this.show();
  }

  /** Targets that the run has or is getting. */
  get targets() {
    return this.status.targets.filter((target) => target.state !== "draining").length;
  }

  show() {
    if (!this.status) return;
    by("steer").hidden = !this.status.is_live && !by("answer").textContent;
    by("token-form").hidden = this.isUnlocked || !this.status.is_live;
    by("buttons").hidden = !this.isUnlocked || !this.status.is_live;
    by("wanted").value = this.wanted ?? this.targets;
    by("fewer").disabled = (this.wanted ?? this.targets) <= 1; // a pause is how to use none
    by("pause").textContent = this.status.state === "paused" ? "Continue" : "Pause";
  }

  change(by_) {
    this.wanted = Math.max(1, (this.wanted ?? this.targets) + by_);
    this.show();
    clearTimeout(this.settling);
    this.settling = setTimeout(async () => {
      const targets = this.wanted;
      await this.send({ action: "scale", targets });
      if (this.wanted === targets) this.wanted = null;
      this.show();
    }, SETTLE_MS);
  }

  async send(action) {
    this.say(action.action === "scale" ? `Asking for ${action.targets} targets…` : "Asking the run…");
    try {
      const { ok, status, body } = await call("api/control", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...action, request_id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` }),
      });
      this.say(ok ? body.message : body.detail, ok ? "good" : "bad");
      if (status === 401) {
        token.clear();
        this.isUnlocked = false;
      }
    } catch {
      this.say("The dashboard does not answer; nothing was changed.", "bad");
    }
    this.show();
  }

  say(text, tone = "good") {
    by("answer").textContent = text;
    by("answer").dataset.tone = tone;
  }
}
