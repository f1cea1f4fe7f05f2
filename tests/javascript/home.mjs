// A device's folder. What it holds survives the process: a file is there whole, or as it was before.

import { promises as fs } from 'node:fs';
import path from 'node:path';

export class Home {
  constructor(folder) {
    this.folder = folder;
  }

  path(name) {
    return path.join(this.folder, name);
  }

  async read(name) {
    try {
      return await fs.readFile(this.path(name));
    } catch (error) {
      if (error.code === 'ENOENT') return null;
      throw error;
    }
  }

  async write(name, content) {
    const target = this.path(name);
    await fs.mkdir(path.dirname(target), { recursive: true, mode: 0o700 });
    const draft = await fs.open(`${target}.new`, 'w', 0o600);
    try {
      await draft.writeFile(content);
      await draft.sync();
    } finally {
      await draft.close();
    }
    await fs.rename(`${target}.new`, target);
  }

  async append(name, content) {
    await fs.mkdir(path.dirname(this.path(name)), { recursive: true, mode: 0o700 });
    await fs.appendFile(this.path(name), content, { mode: 0o600 });
  }

  async remove(name) {
    await fs.rm(this.path(name), { force: true });
  }

  async rename(from, to) {
    await fs.rename(this.path(from), this.path(to));
  }

  async names(folder) {
    return fs.readdir(this.path(folder)).catch(() => []);
  }

  async size(name) {
    return fs.stat(this.path(name)).then((found) => found.size, () => 0);
  }

  // Trees of plain JSON; bytes in them travel as {"hex": …}.
  async load(name) {
    const content = await this.read(name);
    const revived = (_, value) => (value?.hex === undefined ? value : Buffer.from(value.hex, 'hex'));
    return content && JSON.parse(content, revived);
  }

  async save(name, tree) {
    await this.write(name, JSON.stringify(tree, (_, value) => (
      value?.type === 'Buffer' ? { hex: Buffer.from(value.data).toString('hex') } : value
    )));
  }
}
