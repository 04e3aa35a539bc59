// Asks a GGUF file through llama.cpp (the npm package node-llama-cpp): reads a request from standard input, see llama_cpp.py.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";
import path from "node:path";

const request = JSON.parse(await new Response(process.stdin).text());
const resolved = createRequire(path.join(request.node, "package.json")).resolve("node-llama-cpp");
const {getLlama, JinjaTemplateChatWrapper} = await import(pathToFileURL(resolved).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: request.model, gpuLayers: 0});
const context = await model.createContext({contextSize: request.context, threads: 1});
const sequence = context.getSequence();
const greedy = {temperature: 0};

function templated(turns) {
    const template = model.fileInfo.metadata.tokenizer.chat_template;
    const history = turns.map(({role, content}) => ({type: role, text: content}));
    const wrapper = new JinjaTemplateChatWrapper({template});
    const {contextText} = wrapper.generateContextState({chatHistory: [...history, {type: "model", response: []}]});
    return begun(contextText.tokenize(model.tokenizer));
}

function begun(tokens) {
    const begin = model.tokens.shouldPrependBosToken ? model.tokens.bos : null;
    return begin == null || tokens[0] === begin ? [...tokens] : [begin, ...tokens];
}

async function asked({text, ids, turns, most}) {
    const found = {tokens: begun(model.tokenize(text, true))};
    if (turns) found.templated = templated(turns);
    await sequence.clearHistory();
    const last = [ids.at(-1), {generateNext: {probabilities: true, options: greedy}}];
    const read = await sequence.controlledEvaluate([...ids.slice(0, -1), last]);
    found.likely = [...read.at(-1).next.probabilities].filter(([, p]) => p > request.least);
    await sequence.clearHistory();
    found.answer = [];
    for await (const token of sequence.evaluate(ids, {...greedy, yieldEogToken: true})) {
        if (model.isEogToken(token) || found.answer.length === most) break;
        found.answer.push(token);
    }
    found.ended = found.answer.length < most;
    return found;
}

const answers = [];
for (const prompt of request.prompts) answers.push(await asked(prompt));
process.stdout.write(JSON.stringify({answers}) + "\n");
await llama.dispose();
