// Server-sent events over fetch: unlike EventSource it sends a token, and says why a connection was refused.

const LONGEST_PAUSE_MS = 5000;
const SILENCE_MS = 15000; // a living dashboard sends its state every 5 s

/**
 * Follows the updates after an id until stopped; connects again by itself and goes on behind the last one it saw.
 *
 * @param {{lastId: string, headers: () => object, onUpdate: (data: object) => void, onReset: () => void,
 *   onConnection: (isUp: boolean, status?: number) => void}} options
 * @returns {() => void} ends it
 */
export function follow({ lastId, headers, onUpdate, onReset, onConnection }) {
  let id = lastId;
  let pauseMs = 500;
  let isStopped = false;
  let abort = new AbortController();

  async function connect() {
    abort = new AbortController();
    const watchdog = () => { clearTimeout(timer); timer = setTimeout(() => abort.abort(), SILENCE_MS); };
    let timer;
    watchdog();
    try {
      const answer = await fetch("api/events", { headers: { ...headers(), "Last-Event-ID": id }, signal: abort.signal, cache: "no-store" });
      if (!answer.ok) {
        onConnection(false, answer.status);
        return;
      }
      onConnection(true);
      pauseMs = 500;
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const { done, value } = await reader.read();
        if (done) return;
        watchdog();
        const blocks = (rest + value).split("\n\n");
        rest = blocks.pop();
        blocks.forEach(take);
      }
    } catch {
      // The network is gone, or the dashboard: the next try will tell.
    } finally {
      clearTimeout(timer);
    }
  }

  function take(block) {
    const fields = Object.fromEntries(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
    if (isStopped) return;
    if (fields.event === "reset") {
      stop();
      onReset();
    } else {
      onUpdate(JSON.parse(fields.data));
      if (fields.id) id = fields.id;
    }
  }

  // A browser may keep a page that was left, to come back to it, and its connection with it: after six of them it opens
  // no other one. On coming back the loop below goes on.
  const leave = () => abort.abort();
  addEventListener("pagehide", leave);

  function stop() {
    isStopped = true;
    abort.abort();
    removeEventListener("pagehide", leave);
  }

  (async () => {
    while (!isStopped) {
      await connect();
      if (isStopped) return;
      onConnection(false);
      await new Promise((resolve) => setTimeout(resolve, pauseMs));
      pauseMs = Math.min(LONGEST_PAUSE_MS, pauseMs * 2);
    }
  })();
  return stop;
}
