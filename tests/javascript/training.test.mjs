// node --test training.test.mjs: what plans ask, on a graph that only notes what it is given; when a device may work.

import assert from 'node:assert/strict';
import test from 'node:test';

import { Device } from './device.mjs';
import { clipped, judge, train } from './training.mjs';

class Tensor {
  constructor(type, data, dims) {
    Object.assign(this, { type, data, dims });
  }
}

// Ten examples, each its own number; the newest come last.
const numbers = Float32Array.from({ length: 10 }, (_, at) => at);
const tensor = new Tensor('float32', numbers, [10]);
const examples = { inputs: { x: tensor }, targets: { y: tensor } };
const none = { inputs: {}, targets: {} };
const PLAN = {
  epochs: 2, batch_size: 4, max_steps: 0, max_seconds: 0, max_examples: 0, min_examples: 1, hyperparameters: { lr: 0.5 },
};
const ALWAYS = { random: Math.random, now: () => 0, mayWork: () => true };

// A bundle whose graphs note their batches, and find a loss of 2 and one right answer in each.
function noting(hyperparameters = { lr: 1 }) {
  const seen = { batches: [], scalars: null };
  const note = (inputs) => seen.batches.push(Array.from(inputs.x.data));
  const trainer = async (scalars) => {
    seen.scalars = scalars;
    return { state: {}, step: async (inputs) => { note(inputs); return 2; } };
  };
  const evaluator = async () => async (inputs) => { note(inputs); return { correct: 1, examples: inputs.x.dims[0] }; };
  const manifest = { hyperparameters, metrics: ['correct', 'examples'] };
  return { seen, ort: { Tensor }, manifest, trainer, evaluator, weights: async () => ({}) };
}

const sorted = (batches) => batches.flat().sort((a, b) => a - b);

test('each epoch sees each example once, the last batch of it may be short', async () => {
  const bundle = noting();
  const { metrics, examples: count } = await train(bundle, PLAN, examples, ALWAYS);
  assert.deepEqual(bundle.seen.batches.map(({ length }) => length), [4, 4, 2, 4, 4, 2]);
  assert.deepEqual(sorted(bundle.seen.batches.slice(0, 3)), Array.from(numbers));
  assert.deepEqual([metrics, count], [{ train_loss: 40, train_examples: 20 }, 10]);
  assert.deepEqual(bundle.seen.scalars, { lr: 0.5 });
});

test('what a plan limits is kept', async () => {
  for (const [limit, batches] of [[{ max_steps: 2 }, [4, 4]], [{ max_examples: 3 }, [3, 3]], [{ epochs: 0 }, []]]) {
    const bundle = noting();
    await train(bundle, { ...PLAN, ...limit }, examples, ALWAYS);
    assert.deepEqual(bundle.seen.batches.map(({ length }) => length), batches);
    if (limit.max_examples) assert.deepEqual(sorted(bundle.seen.batches), [7, 7, 8, 8, 9, 9]);
  }
  let seconds = 0;
  const slow = noting();
  const clock = { ...ALWAYS, now: () => 1000 * (seconds += 2) };
  const { examples: count } = await train(slow, { ...PLAN, max_seconds: 3 }, examples, clock);
  assert.deepEqual([slow.seen.batches.length, count], [1, 4]);
});

test('too few examples and hyper-parameters of another model are refused', async () => {
  const warm = { hyperparameters: { warmth: 1 } };
  for (const [changes, given] of [[{ min_examples: 11 }, examples], [{}, none], [warm, examples]]) {
    await assert.rejects(train(noting(), { ...PLAN, ...changes }, given, ALWAYS), { code: 'out-of-bounds' });
  }
});

test('a model with dropout gets a seed of its own in each run, unless the plan names one', async () => {
  const [first, second, chosen] = [noting({ seed: 0 }), noting({ seed: 0 }), noting({ seed: 0 })];
  for (const bundle of [first, second]) await train(bundle, { ...PLAN, hyperparameters: {} }, examples, ALWAYS);
  await train(chosen, { ...PLAN, hyperparameters: { seed: 7 } }, examples, ALWAYS);
  assert.ok(Number.isInteger(first.seen.scalars.seed) && first.seen.scalars.seed < 2 ** 24);
  assert.notEqual(first.seen.scalars.seed, second.seen.scalars.seed);
  assert.equal(chosen.seen.scalars.seed, 7);
});

test('training stops within a step when the device is needed', async () => {
  const bundle = noting();
  const mayWork = () => bundle.seen.batches.length < 2;
  await assert.rejects(train(bundle, PLAN, examples, { ...ALWAYS, mayWork }), { code: 'interrupted' });
  assert.equal(bundle.seen.batches.length, 2);
});

test('what is held back is judged once, in order', async () => {
  const bundle = noting();
  assert.deepEqual(await judge(bundle, PLAN, examples), { correct: 3, examples: 10 });
  assert.deepEqual(bundle.seen.batches.flat(), Array.from(numbers));
});

test('a delta is clipped to its norm and never lengthened', () => {
  assert.deepEqual(clipped(Float32Array.of(3, 4), 1), Float32Array.of(0.6, 0.8));
  assert.deepEqual(clipped(Float32Array.of(3, 4), 9), Float32Array.of(3, 4));
  assert.deepEqual(clipped(Float32Array.of(3, 4), 0), Float32Array.of(3, 4));
  assert.throws(() => clipped(Float32Array.of(NaN), 1), { code: 'not-finite' });
});

test('a device that may not work asks nobody', async () => {
  const { ending } = await new Device(null, null, { training: none, heldBack: none }, { mayWork: () => false }).visit();
  assert.equal(ending, 'not-now');
});
