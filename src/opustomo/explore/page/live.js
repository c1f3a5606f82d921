// Training as it goes: asked again and again, often while it runs.
import { $, json, make, run, say } from "./api.js";
import { curves } from "./charts.js";

const OFTEN = 3000, SELDOM = 15000; // ms
const time = (s) => s < 90 ? `${s.toFixed(0)} s` : s < 5400 ? `${(s / 60).toFixed(0)} min` : `${(s / 3600).toFixed(1)} h`;

function draw(found) {
  const { status } = found;
  if (status) {
    const words = [`${status.state}${status.epoch === null ? "" : `, epoch ${status.epoch} of ${status.epochs}`}`];
    if (status.state === "running" && status.seconds_left !== null)
      words.push(`about ${time(status.seconds_left)} left at ${status.particles_per_second.toPrecision(3)} particles/s`);
    if (status.held_out !== null)
      words.push(`held out ${status.held_out.toFixed(2)} nats, linear stage ${status.linear.toFixed(2)}`,
        `best after epoch ${status.best_epoch}`);
    if (status.next) words.push(`go on with: ${status.next}`);
    $("state").textContent = words.join(" · ");
    $("warnings").replaceChildren(...status.warnings.map((text) => make("li", { textContent: text })));
  } else $("state").textContent = "no log here: made by another program, or copied without it";
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
      pause = last.status?.state === "running" ? OFTEN : SELDOM;
    } catch (error) { say(error.message, true); }
    setTimeout(ask, pause);
  };
  $("tab-live").addEventListener("click", () => last && draw(last));
  await ask();
}
