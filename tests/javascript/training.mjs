// From a plan and a device's own examples to what it reports: a delta, sums of metrics, and a weight.
//
// Examples are `{ inputs, targets }`, each tensors by name with the examples along the first axis.

import { stateOf } from './bundle.mjs';
import { refuseUnless } from './errors.mjs';
import { encode, number } from './wire.mjs';

const columnsOf = (examples) => [...Object.values(examples.inputs), ...Object.values(examples.targets)];

export const countOf = (examples) => columnsOf(examples)[0]?.dims[0] ?? 0;

function take(ort, columns, rows) {
  return Object.fromEntries(Object.entries(columns).map(([name, { type, dims, data }]) => {
    const width = dims.slice(1).reduce((product, length) => product * length, 1);
    const taken = new data.constructor(rows.length * width);
    rows.forEach((row, at) => taken.set(data.subarray(row * width, (row + 1) * width), at * width));
    return [name, new ort.Tensor(type, taken, [rows.length, ...dims.slice(1)])];
  }));
}

function shuffled(count, random) {
  const rows = Array.from({ length: count }, (_, row) => row);
  for (let last = count - 1; last > 0; last -= 1) {
    const other = Math.floor(random() * (last + 1));
    [rows[last], rows[other]] = [rows[other], rows[last]];
  }
  return rows;
}

// Batches of rows, epoch after epoch, each in an order of its own; the last one of an epoch may be short.
function* batchesOf(plan, rows, random) {
  let steps = 0;
  for (let epoch = 0; epoch < plan.epochs; epoch += 1) {
    const order = shuffled(rows.length, random);
    for (let start = 0; start < order.length; start += plan.batch_size) {
      if (plan.max_steps && steps === plan.max_steps) return;
      steps += 1;
      yield order.slice(start, start + plan.batch_size).map((place) => rows[place]);
    }
  }
}

// What the training graph is given: the plan's values, and a seed of this run's own where the model has dropout.
function hyperparametersOf({ manifest }, plan, random) {
  const unknown = Object.keys(plan.hyperparameters).filter((name) => !(name in manifest.hyperparameters));
  refuseUnless(!unknown.length, 'out-of-bounds', `the training graph has no ${unknown.join(', ')}`);
  const seed = 'seed' in manifest.hyperparameters ? { seed: Math.floor(random() * 2 ** 24) } : {};
  return { ...seed, ...plan.hyperparameters };
}

export function requireEnough(examples, plan) {
  const [count, least] = [countOf(examples), Math.max(plan.min_examples, 1)];
  refuseUnless(count >= least, 'out-of-bounds', `${count} examples on this device; the plan asks for ${least}`);
  return count;
}

// Trains as the plan says. Gives the new state by name, the sums of the training loss, and how many examples took part.
// A run that is interrupted starts anew at the next visit. What `accumulate` leaves over at the end (see
// docs/reference/bundle.md) is lost.
export async function train(bundle, plan, examples, { random, now, mayWork }) {
  const count = requireEnough(examples, plan);
  // The newest, which come last.
  const first = Math.max(0, count - (plan.max_examples || count));
  const rows = Array.from({ length: count - first }, (_, place) => first + place);
  const trainer = await bundle.trainer(hyperparametersOf(bundle, plan, random));
  const ends = plan.max_seconds ? now() + 1000 * plan.max_seconds : Infinity;
  const sums = { train_loss: 0, train_examples: 0 };
  const seen = new Set();
  for (const batch of batchesOf(plan, rows, random)) {
    if (now() >= ends && seen.size) break;
    refuseUnless(mayWork(), 'interrupted', 'the device is needed');
    const [inputs, targets] = [examples.inputs, examples.targets].map((columns) => take(bundle.ort, columns, batch));
    const loss = await trainer.step(inputs, targets);
    sums.train_loss += loss * batch.length;
    sums.train_examples += batch.length;
    batch.forEach((row) => seen.add(row));
  }
  return { state: trainer.state, metrics: sums, examples: seen.size };
}

// What `evaluate` finds with the bundle's own weights on examples that are held back.
export async function judge(bundle, plan, examples) {
  const evaluate = await bundle.evaluator(await bundle.weights());
  const sums = Object.fromEntries(bundle.manifest.metrics.map((name) => [name, 0]));
  const rows = Array.from({ length: countOf(examples) }, (_, row) => row);
  for (let start = 0; start < rows.length; start += plan.batch_size) {
    const batch = rows.slice(start, start + plan.batch_size);
    const found = await evaluate(take(bundle.ort, examples.inputs, batch), take(bundle.ort, examples.targets, batch));
    for (const [name, value] of Object.entries(found)) sums[name] += number(value, name);
  }
  return sums;
}

// New minus old, of all that travels, in the sorted order of the names, as one vector.
export function deltaOf(bundle, before, after) {
  const names = stateOf(bundle.manifest).map(([name]) => name).sort();
  const pieces = names.map((name) => after[name].data.map((value, at) => value - before[name].data[at]));
  const delta = new Float32Array(pieces.reduce((length, piece) => length + piece.length, 0));
  let place = 0;
  for (const piece of pieces) {
    delta.set(piece, place);
    place += piece.length;
  }
  return delta;
}

export function normOf(vector) {
  let squares = 0;
  for (const value of vector) squares += value * value;
  return number(Math.sqrt(squares), 'the norm of the delta');
}

// Scaled down to norm `most`, if it is longer; 0 leaves it as it is.
export function clipped(vector, most) {
  const norm = normOf(vector);
  return most && norm > most ? vector.map((value) => value * (most / norm)) : vector;
}

// What a report of a public round opens to. Nothing that isn't a finite number is ever sent.
export function encodeUpdate({ delta, weight, metrics }) {
  normOf(delta);
  refuseUnless(number(weight, 'the weight') > 0, 'out-of-bounds', `a report of weight ${weight}`);
  Object.entries(metrics).forEach(([name, value]) => number(value, name));
  const bytes = Buffer.from(delta.buffer, delta.byteOffset, delta.byteLength);
  return encode('UpdateBody', { delta: bytes, weight, metrics });
}
