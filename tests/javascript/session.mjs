// One session, from its assignment to the end of its report; kept on disk, so that a lost process goes on with it.
//
// The shape is what happened, one letter an event (docs/reference/device-protocol.md, "Session shapes").

import { sha256 } from './identity.mjs';
import { decode, encode } from './wire.mjs';

const LONGEST_SHAPE = 64;

export class Session {
  constructor(home, tree) {
    Object.assign(this, { home, ...tree });
    this.assignment = decode('Assignment', tree.content);
  }

  static async begin(home, assignment) {
    await home.remove('report.bin');
    const session = new Session(home, { content: encode('Assignment', assignment), shape: '-', report: null });
    await session.#save();
    return session;
  }

  static async load(home) {
    const tree = await home.load('session.json');
    return tree && new Session(home, tree);
  }

  #save() {
    const { content, shape, report } = this;
    return this.home.save('session.json', { content, shape, report });
  }

  async add(letter) {
    this.shape = this.shape.slice(0, LONGEST_SHAPE - 1) + letter;
    await this.#save();
  }

  // Keeps the sealed bytes: every try sends the same ones, under the same id.
  async keepReport(reportId, sealed) {
    await this.home.write('report.bin', sealed);
    const { session_id, upload_token } = this.assignment;
    const [sealed_size, sealed_digest] = [sealed.length, sha256(sealed).toString('hex')];
    this.report = { session_id, report_id: reportId, upload_token, sealed_size, sealed_digest };
    await this.#save();
  }

  sealed() {
    return this.home.read('report.bin');
  }

  record(error = '') {
    return { task: this.assignment.task, round: this.assignment.round, shape: this.shape, error };
  }

  async forget() {
    await this.home.remove('session.json');
    await this.home.remove('report.bin');
  }
}
