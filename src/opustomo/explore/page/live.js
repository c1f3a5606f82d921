// Training as it goes: asked again and again, often while it runs.
import { $, json, run, say } from "./api.js";
import { curves } from "./charts.js";

const OFTEN = 3000, SELDOM = 15000; // ms

function draw(found) {
  $("state").textContent = found.words;
  if ($("live").hidden) return;
  const ended = found.val_elbo.map((v, i) => [v, i]).filter(([v]) => v !== null), epochs = ended.map((_, i) => i);
  const linear = found.linear_val_elbo.filter((v) => v !== null);
  curves($("bound"), [{ x: epochs, y: ended.map(([v]) => v), colour: "#0072b2", name: "held out" },
    { x: epochs, y: linear.slice(0, epochs.length), colour: "#d55e00", dashed: true, name: "linear stage" }],
  ["epoch", "bound, nats per particle"]);
  const seen = found.particles.map((v, i) => [v, found.loss[i]]).filter(([v, loss]) => v !== null && loss !== null);
  curves($("loss"), [{ x: seen.map(([v]) => v), y: seen.map(([, v]) => v), colour: "#009e73" }], ["particles seen", "loss"]);
  $("preview").hidden = found.preview === null;
  if (found.preview !== null) {
    const address = `/api/${run}/preview?at=${found.preview}`;
    if ($("preview").getAttribute("src") !== address) $("preview").src = address;
  }
}

// ``newer`` is called with the last epoch that has codes, where it is to be followed.
export async function watch(newer) {
  let seen = -1, pause = SELDOM, last = null;
  const ask = async () => {
    try {
      last = await json("live");
      draw(last);
      const latest = last.epochs.at(-1) ?? -1;
      if (seen !== latest && latest >= 0 && $("follow").checked) { await newer(latest); seen = latest; }
      pause = last.running ? OFTEN : SELDOM;
    } catch (error) { say(error.message, true); }
    setTimeout(ask, pause);
  };
  $("tab-live").addEventListener("click", () => last && draw(last));
  await ask();
}
