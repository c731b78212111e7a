// Runs the unmodified official client against the emulator: node send.js PORT TOKEN
// Prints one line of JSON: for each call, what its callback was told (null: success).
const Mixpanel = require("mixpanel");

const [port, token] = process.argv.slice(2);
const target = { host: "127.0.0.1", port: Number(port), protocol: "http", keepAlive: false };
const quiet = Mixpanel.init(token, { ...target, key: "legacy-key" });
const verbose = Mixpanel.init(token, { ...target, key: "legacy-key", verbose: true });
const foreign = Mixpanel.init("another-token", target);

const now = Math.floor(Date.now() / 1000);
// Its base64 holds plus signs and slashes, which the client does not escape.
const awkward = ">>>???~~~ÿÿÿ";
const batch = Array.from({ length: 120 }, (_, n) => ({
  event: "node batch",
  properties: { time: now - 60 - n, distinct_id: `user-${n}`, $insert_id: `node-${n}`, awkward },
}));

const calls = {
  track: (done) => quiet.track("node track", { distinct_id: "a", awkward }, done),
  track_verbose: (done) => verbose.track("node track", { distinct_id: "b" }, done),
  track_foreign: (done) => foreign.track("node foreign", { distinct_id: "c" }, done),
  track_batch: (done) => quiet.track_batch(batch.slice(0, 3).map((e) => ({ ...e, event: "node track_batch" })), done),
  import: (done) => quiet.import("node import", now - 86400 * 30, { distinct_id: "d" }, done),
  import_batch: (done) => verbose.import_batch(batch, done),
  import_bad: (done) => verbose.import("node bad", 5, { distinct_id: "e" }, done),
  people_set: (done) => quiet.people.set("a", { name: "Ada" }, done),
  people_increment: (done) => verbose.people.increment("a", "visits", 1, done),
  groups_set: (done) => quiet.groups.set("company", "acme", { plan: "free" }, done),
};

const told = {};
for (const [name, call] of Object.entries(calls)) {
  call((error) => {
    const errors = [error].flat().filter(Boolean);
    told[name] = errors.length ? errors.map((each) => each.message).join("; ") : null;
    if (Object.keys(told).length === Object.keys(calls).length) console.log(JSON.stringify(told));
  });
}
