// Judges quotes with @phala/dcap-qvl: one JSON request a line on stdin, one JSON answer a line on stdout.
//
// A request names the quote and the root (hex), the time (Unix seconds), and either a PCS to ask over HTTP, or the
// collateral itself.
"use strict";

const readline = require("readline");
const qvl = require("@phala/dcap-qvl");

async function judge(line) {
  const request = JSON.parse(line);
  const quote = Buffer.from(request.quote, "hex");
  const collateral = request.collateral || (await qvl.getCollateral(request.pcs, quote));
  const verifier = new qvl.QuoteVerifier(Buffer.from(request.root, "hex"));
  const report = verifier.verify(quote, collateral, request.now);
  return { accepted: true, status: report.status, advisory_ids: report.advisory_ids };
}

async function main() {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    let answer;
    try {
      answer = await judge(line);
    } catch (error) {
      const cause = error.cause ? `: ${error.cause.message}` : "";
      answer = { accepted: false, error: `${error.message}${cause}` };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
  }
}

main();
