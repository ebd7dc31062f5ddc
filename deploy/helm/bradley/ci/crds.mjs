// Validates custom resources against the models that kubernetes-models generates from the projects'
// Go sources: `node crds.mjs FOLDER <documents.json`.
//
// FOLDER has node_modules. Standard input is a JSON list of documents. The output is a list with the
// findings of each document, empty for a valid one. Each document is checked twice: the models'
// validators check values (patterns, ranges, required fields), and the TypeScript compiler checks
// names, because an object literal must not have a field that its type does not have.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const folder = resolve(process.argv[2]);
const require = createRequire(join(folder, "x.js"));
const ts = require("typescript");
const PACKAGES = {
  "monitoring.coreos.com": "@kubernetes-models/prometheus-operator",
  "keda.sh": "@kubernetes-models/keda",
  "gateway.networking.k8s.io": "@kubernetes-models/gateway-api",
};

const documents = JSON.parse(readFileSync(0, "utf8"));
const findings = documents.map(() => []);
const lines = documents.map((document, i) => {
  const [group, version] = document.apiVersion.split("/");
  const path = `${PACKAGES[group]}/${group}/${version}/${document.kind}`;
  return { path, text: `const d${i}: import(${JSON.stringify(path)}).I${document.kind} = ${JSON.stringify(document)};` };
});

// The file exists in memory only. Its path is in FOLDER, so that its imports are found there.
const file = join(folder, "documents.mts");
const source = lines.map((line) => line.text).join("\n") + "\nexport {};\n";
const options = { strict: true, noEmit: true, skipLibCheck: true, module: ts.ModuleKind.NodeNext, target: ts.ScriptTarget.ES2022, types: [] };
const host = ts.createCompilerHost(options);
const { readFile, fileExists, getSourceFile } = host;
host.fileExists = (name) => name === file || fileExists.call(host, name);
host.readFile = (name) => (name === file ? source : readFile.call(host, name));
host.getSourceFile = (name, ...rest) =>
  name === file ? ts.createSourceFile(name, source, ...rest) : getSourceFile.call(host, name, ...rest);
const program = ts.createProgram([file], options, host);
for (const diagnostic of ts.getPreEmitDiagnostics(program)) {
  const text = ts.flattenDiagnosticMessageText(diagnostic.messageText, " ");
  if (diagnostic.file?.fileName !== file) throw new Error(text);
  findings[diagnostic.file.getLineAndCharacterOfPosition(diagnostic.start).line].push(text);
}

for (const [i, { path }] of lines.entries()) {
  const model = await import(pathToFileURL(join(folder, "node_modules", `${path}.js`)));
  try {
    new model[documents[i].kind](documents[i]).validate();
  } catch (e) {
    findings[i].push(e.message);
  }
}
console.log(JSON.stringify(findings));
