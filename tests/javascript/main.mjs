// node main.mjs PROTOS HOME enrol CODE [CARD TOKEN]: become a device, and a participant that the card's helper knows.
// node main.mjs PROTOS HOME visit EXAMPLES [FLOORS [AHEAD]]: pay one visit, and print as JSON how it ended.
//
// What the last report holds lies in HOME as update.json, for whoever wants to see it.
//
// PROTOS is the folder of the .proto files, HOME the device's own. EXAMPLES is a safetensors file whose tensors are
// named `training.input.<name>`, `training.target.<name>`, and the same for `heldBack`; FLOORS, as JSON, is what the
// device asks of a private round; AHEAD is by how many seconds its clock is fast, to try what happens later.

import { readFile } from 'node:fs/promises';

import * as ort from 'onnxruntime-web';

import { readSafetensors } from './bundle.mjs';
import { Device } from './device.mjs';
import { enrol } from './enrolment.mjs';
import { Home } from './home.mjs';
import { enrolAtHelper, readCard } from './private.mjs';
import { loadProtos } from './wire.mjs';

ort.env.wasm.numThreads = 1;

async function examplesIn(file) {
  const examples = { training: { inputs: {}, targets: {} }, heldBack: { inputs: {}, targets: {} } };
  for (const [label, tensor] of Object.entries(readSafetensors(ort, new Uint8Array(await readFile(file))))) {
    const [set, role, name] = label.split('.');
    examples[set][`${role}s`][name] = tensor;
  }
  return examples;
}

const [protos, folder, verb, ...words] = process.argv.slice(2);
loadProtos(protos);
const home = new Home(folder);
let told;
if (verb === 'enrol') {
  const [code, card, token] = words;
  const { id, population } = await enrol(home, code);
  if (card) await enrolAtHelper(home, readCard(await readFile(card)), token, population);
  told = { id, population };
} else {
  const [examples, floors = '{}', ahead = 0] = words;
  const onUpdate = (update) => home.write('update.json', JSON.stringify({ ...update, delta: Array.from(update.delta) }));
  const options = { floors: JSON.parse(floors), now: () => Date.now() + 1000 * ahead, onUpdate };
  told = await new Device(home, ort, await examplesIn(examples), options).visit();
}
process.stdout.write(`${JSON.stringify(told)}\n`);
