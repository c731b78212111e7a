// The official `mixpanel` package from npm: lines come in on a socket, import_batch sends them.
// The package sends at most 50 events a request, as base64 in a form, uncompressed; 16 requests at once.
// Nothing is acked, and what is waiting is in memory.
//
//     node batches.js LISTEN_PORT MIXPANEL_URL
"use strict";
const net = require("net");
const Mixpanel = require("mixpanel");
const { TOKEN, mixpanelEvent } = require("./mapping.js");

const AT_ONCE = 16;
const FLUSH_MS = 200;

const [port, to] = process.argv.slice(2);
const { hostname, port: sinkPort } = new URL(to);
const client = Mixpanel.init(TOKEN, { key: "key", protocol: "http", host: hostname, port: sinkPort, keepAlive: true });

let events = [];
let open = 0; // batches under way

net
  .createServer((socket) => {
    let rest = "";
    socket.setEncoding("utf8");
    const send = (count) => {
      const batch = events.splice(0, count);
      open += 1;
      if (open >= AT_ONCE) socket.pause();
      client.import_batch(batch, { max_batch_size: 50 }, (errors) => {
        const failed = errors && errors.filter(Boolean);
        if (failed && failed.length) console.error(String(failed[0]));
        open -= 1;
        if (open < AT_ONCE) socket.resume();
      });
    };
    socket.on("data", (data) => {
      const lines = (rest + data).split("\n");
      rest = lines.pop();
      for (const line of lines) events.push(mixpanelEvent(JSON.parse(line)));
      while (events.length >= 50) send(50);
    });
    socket.on("error", () => {});
    const flush = setInterval(() => events.length && send(50), FLUSH_MS);
    socket.on("close", () => {
      while (events.length) send(50);
      clearInterval(flush);
    });
  })
  .listen(Number(port), "127.0.0.1");
