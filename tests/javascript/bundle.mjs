// A bundle of Umbel in JavaScript: answers and training steps on onnxruntime-web, with nothing but the bundle's files.
//
// `files` gives the content of a bundle's file by its name as a Uint8Array: from disk, from `fetch`, or from a cache.
// Everything here runs in a browser as well as under Node.

const ARRAYS = { F32: Float32Array, I32: Int32Array, I64: BigInt64Array, U8: Uint8Array, BOOL: Uint8Array };
const TYPES = { F32: 'float32', I32: 'int32', I64: 'int64', U8: 'uint8', BOOL: 'bool' };

// The tensors of a safetensors file by name.
export function readSafetensors(ort, bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    if (name === '__metadata__') continue;
    const data = bytes.slice(8 + length + begin, 8 + length + end);
    tensors[name] = new ort.Tensor(TYPES[dtype], new ARRAYS[dtype](data.buffer), shape);
  }
  return tensors;
}

async function session(ort, files, manifest, signature) {
  const graph = await files(manifest.graphs.onnx[signature]);
  // Weights that a graph takes as constants are references into the bundle's weights file.
  const externalData = [{ path: 'weights.safetensors', data: await files('weights.safetensors') }];
  return ort.InferenceSession.create(graph, { executionProviders: ['wasm'], externalData });
}

// What training moves and what travels: weights and buffers, as `[name, dtype, shape]`.
export const stateOf = (manifest) => [...manifest.trainable, ...manifest.buffers];

export class Bundle {
  constructor(ort, files, manifest) {
    Object.assign(this, { ort, files, manifest });
  }

  static async open(ort, files) {
    return new Bundle(ort, files, JSON.parse(new TextDecoder().decode(await files('manifest.json'))));
  }

  // Answers a batch: tensors by name to tensors by name.
  async predictor() {
    const native = await session(this.ort, this.files, this.manifest, 'infer');
    return (inputs) => native.run(inputs);
  }

  // Judges a batch with these weights: metrics by name, as sums over the batch.
  async evaluator(weights) {
    const native = await session(this.ort, this.files, this.manifest, 'evaluate');
    const state = Object.fromEntries(stateOf(this.manifest).map(([name]) => [name, weights[name]]));
    return async (inputs, targets) => {
      const given = await native.run({ ...state, ...inputs, ...targets });
      return Object.fromEntries(this.manifest.metrics.map((name) => [name, Number(given[name].data[0])]));
    };
  }

  // The weights that the bundle came with, by name.
  async weights() {
    return readSafetensors(this.ort, await this.files('weights.safetensors'));
  }

  async trainer(hyperparameters = {}) {
    const { ort, manifest } = this;
    const native = await session(ort, this.files, manifest, 'train');
    const weights = await this.weights();
    const state = {};
    for (const [name] of stateOf(manifest)) state[name] = weights[name];
    for (const [name, , shape] of manifest.slots) {
      const size = shape.reduce((product, length) => product * length, 1);
      const anchored = name.startsWith('s_anchor_') && weights['p_' + name.slice('s_anchor_'.length)];
      state[name] = anchored || new ort.Tensor('float32', new Float32Array(size), shape);
    }
    const scalars = {};
    for (const [name, value] of Object.entries({ ...manifest.hyperparameters, ...hyperparameters })) {
      scalars[name] = new ort.Tensor('float32', Float32Array.of(value), []);
    }
    return new Trainer(native, state, scalars);
  }
}

export class Trainer {
  constructor(native, state, scalars) {
    Object.assign(this, { native, state, scalars });
  }

  // One step of the optimiser on a batch; gives its loss before the step. A loss that isn't finite changes nothing.
  async step(inputs, targets) {
    const given = await this.native.run({ ...this.state, ...this.scalars, ...inputs, ...targets });
    const loss = given.loss.data[0];
    if (!Number.isFinite(loss)) throw new Error(`the loss is ${loss}; lower the learning rate, or look for odd examples`);
    for (const name of Object.keys(this.state)) this.state[name] = given['next_' + name] ?? this.state[name];
    return loss;
  }
}
