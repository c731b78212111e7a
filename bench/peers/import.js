// `mixpanel-import` from npm, made for files and streams: each connection is one import, which ends with it.
// Its address is fixed in the package, so its connection pool is pointed elsewhere before the package makes it.
// Nothing is acked, and what is waiting is in memory.
//
//     node import.js LISTEN_PORT MIXPANEL_URL [OPTIONS_JSON]
"use strict";
const net = require("net");
const { Transform } = require("stream");
const { createRequire } = require("module");
const { TOKEN, mixpanelEvent } = require("./mapping.js");

const [port, to, options = "{}"] = process.argv.slice(2);

const undici = createRequire(require.resolve("mixpanel-import"))("undici");
const { Pool } = undici;
undici.Pool = class extends Pool {
  constructor(address, settings) {
    super(to, settings);
  }
};
const load = require("mixpanel-import");

net
  .createServer((socket) => {
    let rest = "";
    socket.setEncoding("utf8");
    const events = new Transform({
      writableObjectMode: false,
      readableObjectMode: true,
      decodeStrings: false,
      transform(data, _, done) {
        const lines = (rest + data).split("\n");
        rest = lines.pop();
        for (const line of lines) this.push(mixpanelEvent(JSON.parse(line)));
        done();
      },
    });
    socket.on("error", () => events.end());
    socket.pipe(events);
    load({ token: TOKEN, secret: TOKEN }, events, { recordType: "event", ...JSON.parse(options) }).catch((error) =>
      console.error(String(error)),
    );
  })
  .listen(Number(port), "127.0.0.1");
